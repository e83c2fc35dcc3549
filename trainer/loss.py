"""The Bradley-Terry loss over groups of ranked candidates, and what is logged beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PairSums:
    """Sums over the pairs of a batch; divide by `pairs` for means."""

    loss: Tensor
    pairs: int
    correct: float
    margin: float


def pair_indices(ranks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions (pairs,) of the better and the worse candidate of every pair.

    A pair is two candidates of one group with different ranks; `ranks` holds one array a group.
    """
    better, worse, offset = [], [], 0
    for group in ranks:
        i, j = np.nonzero(group[:, None] < group[None, :])
        better.append(i + offset)
        worse.append(j + offset)
        offset += len(group)
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([*better, empty]), np.concatenate([*worse, empty])


def pairs_of(ranks: np.ndarray) -> int:
    """How many pairs a group has whose candidates' ranks (K,) are given."""
    return int((ranks[:, None] < ranks[None, :]).sum())


def bradley_terry(scores: Tensor, ranks: Sequence[np.ndarray]) -> PairSums:
    """Sum of -log sigmoid(better - worse) over all pairs of all groups (paper, Eq. 7 and 8).

    `scores` (N,) in fp32 are those of all candidates, group after group as in `ranks`. The caller
    divides by the pairs of the whole global batch, so that parts of a batch weigh as they should.
    An equal score counts as half correct.
    """
    better, worse = pair_indices(ranks)
    flat = torch.from_numpy(np.stack([better, worse])).to(scores.device)
    margin = scores[flat[0]] - scores[flat[1]]
    with torch.no_grad():
        correct = float((margin > 0).sum() + 0.5 * (margin == 0).sum())
        total = float(margin.sum())
    loss = torch.nn.functional.softplus(-margin).sum()
    return PairSums(loss=loss, pairs=len(better), correct=correct, margin=total)
