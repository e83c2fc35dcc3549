"""How tokens are drawn: the settings, a trajectory's random numbers, and the draw itself.

Nothing of models or texts: logits and numbers in, token ids out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from pipelines import ids
from pipelines.settings import Settings

if TYPE_CHECKING:
    import torch


class SamplingSettings(Settings):
    """How tokens are drawn; the defaults are the paper's (arXiv 2507.05197 v2, app. D.1.1)."""

    temperature: float = Field(default=1.0, ge=0, description="softmax temperature; 0 is greedy")
    top_p: float = Field(default=0.9, gt=0, le=1, description="nucleus mass; 1 keeps all")
    top_k: int = Field(default=50, ge=0, description="candidates kept; 0 keeps all")
    max_tokens: int = Field(default=4096, gt=0, description="limit of new tokens")

    @property
    def sampling_id(self) -> bytes:
        """Identity of these values, 16 bytes."""
        return ids.content_id("sampling", self.temperature, self.top_p, self.top_k, self.max_tokens)


def uniform(seed: int, count: int) -> np.ndarray:
    """The first `count` numbers in [0, 1) of a trajectory's stream, float64.

    The t-th is the upper 53 bits of the t-th 64-bit word of Philox 4x64-10 (Salmon et al. 2011)
    under the key (seed, 0), four words a block, block counters from 1: it depends on seed and t
    only.
    """
    words = np.random.Philox(key=seed).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


def draw(logits: torch.Tensor, uniforms: np.ndarray, sampling: SamplingSettings) -> np.ndarray:
    """One token a row, by the inverse of the distribution function at the row's uniform number.

    Temperature, then top-k, then top-p over what is left (the smallest set of likeliest tokens
    that holds at least this share; equal ones by id), as transformers and vLLM have it. The
    function runs over the tokens kept in the order of their ids: in the order of probability two
    nearly equal tokens would change places with the last bit of a logit, and with the batch.
    Arithmetic after the logits is float64.

    Args:
        logits: (rows, vocabulary), float32, each row's largest finite.
        uniforms: (rows,), in [0, 1).
        sampling: of all rows.

    Returns:
        Token ids, (rows,), int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(1).numpy()
    ranked, tokens = (x.numpy() for x in _ranked(logits, sampling.top_k))
    scaled = ranked.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled[:, :1])
    mass = weights.cumsum(axis=1)
    weights[:, 1:][mass[:, :-1] >= sampling.top_p * mass[:, -1:]] = 0  # held without them
    by_id = tokens.argsort(axis=1)
    mass = np.take_along_axis(weights, by_id, axis=1).cumsum(axis=1)
    place = (mass <= uniforms[:, None] * mass[:, -1:]).sum(axis=1)
    rows = np.arange(len(place))
    return tokens[rows, by_id[rows, place]]


def _ranked(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest `top_k` logits (0: all) of each row in descending order, and their token ids.

    Equal logits stand in the order of their ids, which `topk` does not promise: rows that hold any
    among their best are sorted as a whole.
    """
    if not 0 < top_k < logits.shape[1]:
        values, tokens = logits.sort(dim=1, descending=True, stable=True)
        return values, tokens
    values, tokens = logits.topk(top_k + 1, dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(1).nonzero().flatten()
    if len(tied):
        best = logits[tied].sort(dim=1, descending=True, stable=True)
        values[tied], tokens[tied] = best[0][:, : top_k + 1], best[1][:, : top_k + 1]
    return values[:, :top_k], tokens[:, :top_k]
