"""Whose answer is it? Vectors of tokens whose averages over an answer say which policy wrote it.

What they are written into is `real_pool_start`; nothing here knows a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.surface import TEXT_FEATURES, text_features

AUTHORS = 40  # dimensions of a token that are learned
KEPT = 24  # directions of the averages that are compared
LENGTH = 150  # ids at which the length's entry is a half


@dataclass(frozen=True)
class Authors:
    """Vectors of tokens whose averages tell policies apart, and the directions that do so best.

    `tokens` (V, T). A direction is `whole @ average + begin @ average of the first ids, weighed by
    `early`, + length * share + offset`, with matrices (K, T), vectors (K,) and LENGTH / (LENGTH +
    ids) for the share; it has mean 0, variance 1 within policies, and `between` (K,) between them.
    """

    tokens: Tensor
    whole: Tensor
    begin: Tensor
    length: Tensor
    offset: Tensor
    between: Tensor

    def positions(self, rows: list[list[int]], early: Tensor) -> Tensor:
        """Where answers lie in the directions, (n, K)."""
        wholes, begins = _Bags(rows), _Bags([row[: len(early)] for row in rows], early)
        found = [
            wholes.averages(some, self.tokens) @ self.whole.T
            + begins.averages(some, self.tokens) @ self.begin.T
            + (LENGTH / (LENGTH + wholes.sizes[some]))[:, None] * self.length
            for some in torch.arange(len(rows)).split(4096)
        ]
        return torch.cat(found) + self.offset

    def weights(self) -> tuple[Tensor, Tensor]:
        """Of squared differences and of squared sums in the likelihood ratio, (K,) each.

        Under one policy differences have variance 2 and sums 2 + 4 `between`, under two policies
        both have 2 + 2 `between`.
        """
        same, other = 1 / (1 + 2 * self.between), 1 / (1 + self.between)
        return (other - 1) / 4, (other - same) / 4

    def likelihood(self, left: Tensor, right: Tensor) -> Tensor:
        """Logarithm of the likelihood ratio of one policy against two, up to a constant.

        Args:
            left: (..., K) positions.
            right: (..., K) positions.
        """
        differences, sums = self.weights()
        return (left - right).square() @ differences + (left + right).square() @ sums


def authors(
    rows: list[list[int]],
    policies: np.ndarray,
    known: np.ndarray,
    sizes: np.ndarray,
    early: Tensor,
    *,
    epochs: int = 3,
    seed: int,
) -> Authors:
    """Train token vectors so that their averages over an answer tell its policy.

    Args:
        rows: ids of answers, at least one each.
        policies: (n,) whose they are.
        known: (V, F) what each vector starts with, which stays.
        sizes: (V,) root mean square of each vector.
        early: weights of the first ids, in the average over them.
        epochs: times that every answer is seen.
        seed: of first vectors and order.
    """
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.from_numpy(known).float()
    size = torch.from_numpy(sizes).float()[:, None]
    learned = nn.Parameter(0.1 * torch.randn(len(known), AUTHORS, generator=generator))
    labels = torch.from_numpy(policies).long()
    width = fixed.shape[1] + AUTHORS
    probe = nn.Linear(2 * width + 1, int(labels.max()) + 1)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimiser = torch.optim.AdamW(
        [{"params": [learned], "lr": 3e-2}, {"params": probe.parameters(), "lr": 1e-2}],
        weight_decay=0,
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5)
    wholes, begins = _Bags(rows), _Bags([row[: len(early)] for row in rows], early)
    share = LENGTH / (LENGTH + wholes.sizes.float())
    middle, spread = share.mean(), share.std().clamp(min=1e-3)

    def tokens() -> Tensor:
        every = torch.cat([fixed, learned], dim=1)
        return size * every / every.square().mean(1, keepdim=True).sqrt()

    def sides(some: Tensor, vectors: Tensor) -> Tensor:
        length = (share[some] - middle) / spread
        both = [wholes.averages(some, vectors), begins.averages(some, vectors)]
        return torch.cat([*both, length[:, None]], dim=1)

    for _ in range(epochs):
        for some in torch.randperm(len(rows), generator=generator).split(256):
            told = probe(sides(some, tokens()))
            functional.cross_entropy(told, labels[some]).backward()
            optimiser.step()
            optimiser.zero_grad()
        schedule.step()
    with torch.no_grad():
        vectors = tokens()
        x = torch.cat([sides(some, vectors) for some in torch.arange(len(rows)).split(4096)])
        best, between = _directions(x, labels)
        whole, begin, length = best.split([width, width, 1], dim=1)
        length = length[:, 0] / spread
        offset = -best @ x.mean(0) - length * middle
    return Authors(vectors, whole, begin, length, offset, between)


class _Bags:
    """Rows of ids, of which some are averaged at a time, each id by the weight of its place."""

    def __init__(self, rows: list[list[int]], weights: Tensor | None = None) -> None:
        self.flat = torch.from_numpy(np.concatenate(rows)).long()
        ends = np.cumsum([len(row) for row in rows])
        self.starts = torch.from_numpy(np.r_[0, ends[:-1]])
        self.sizes = torch.from_numpy(np.diff(np.r_[0, ends]))
        places = torch.cat([torch.arange(len(row)) for row in rows])
        self.weights = torch.ones(len(self.flat)) if weights is None else weights[places]
        self.totals = torch.zeros(len(rows)).index_add_(
            0, torch.repeat_interleave(self.sizes), self.weights
        )

    def averages(self, some: Tensor, vectors: Tensor) -> Tensor:
        """Mean vector (n, T) of each row's ids."""
        sizes = self.sizes[some]
        spans = zip(self.starts[some].tolist(), sizes.tolist(), strict=True)
        at = torch.cat([torch.arange(start, start + size) for start, size in spans])
        offsets = functional.pad(sizes.cumsum(0)[:-1], (1, 0))
        ids, weights = self.flat[at], self.weights[at]
        sums = functional.embedding_bag(
            ids, vectors, offsets, mode="sum", per_sample_weights=weights
        )
        return sums / self.totals[some, None]


def _directions(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The `KEPT` directions with most variance between policies for a variance of 1 within.

    Source: linear discriminant analysis (Rao, 1948), with a little added to the diagonal.

    Returns:
        Directions (K, F), and their variances between policies (K,).
    """
    counts = torch.bincount(labels)
    middles = torch.zeros(len(counts), x.shape[1]).index_add_(0, labels, x)
    middles /= counts.clamp(min=1)[:, None]
    inside = x - middles[labels]
    within = inside.T @ inside / len(x)
    within += 0.03 * within.diagonal().mean() * torch.eye(len(within))
    sizes, axes = torch.linalg.eigh(within)
    whiten = axes * sizes.rsqrt()
    found, turned = torch.linalg.eigh(whiten.T @ torch.cov(middles[counts > 0].T) @ whiten)
    return (whiten @ turned[:, -KEPT:]).T, found[-KEPT:].clamp(min=1e-3)


def token_features(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the spelling of each token says, (V, F), standardised; and whether it breaks a line."""
    spelled = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    stripped = [text.strip() for text in spelled]
    lengths = np.array([[len(t), len(t.split()), t.startswith(" ")] for t in spelled], float)
    ends = np.array([[s[:1].isupper(), s.isupper() and len(s) > 1] for s in stripped], float)
    features = np.column_stack([text_features(spelled)[:, 6 : len(TEXT_FEATURES)], lengths, ends])
    features -= features.mean(axis=0)
    features /= np.maximum(features.std(axis=0), 1e-6)
    return features, np.array(["\n" in text for text in spelled], float)
