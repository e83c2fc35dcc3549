"""Several groups in one row of ids without padding, and who may see whom in it.

The row holds, group after group, the shared prefix and then what each candidate has of its own.
Positions go on after the prefix for every candidate, so a row is K sequences that share their
beginning. How attention is computed over it belongs to `attention`, the rest of a layer to
`decoder`.

Shapes: T ids of the row, N candidates of all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Pieces = Sequence[tuple[np.ndarray, Sequence[np.ndarray]]]
"""Per group the ids of the shared prefix, and of each candidate what follows it."""
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's: (batch, head, query, key) indices to whether the query sees the key."""


class Segment(NamedTuple):
    """Ids `start:end` of the row, which go on from the ids `prefix:prefix_end`.

    `candidate` counts those of the row; of a shared prefix itself it is None.
    """

    prefix: int
    prefix_end: int
    start: int
    end: int
    candidate: int | None


@dataclass(frozen=True)
class Row:
    """The ids (1, T) and positions (1, T) of a row, its segments, and each candidate's last id."""

    ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    last: Tensor
    plans: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """How kinds of layers compute attention over the row, kept by `blocks`."""

    def sees(self, window: int | None) -> MaskMod:
        """Which keys a query sees: its own segment's and its prefix's, none that come later.

        A layer with a sliding window sees only positions less than `window` before its own.
        """
        device = self.ids.device
        owner = torch.full((self.ids.shape[1],), -1, device=device)
        parent = torch.full((self.ids.shape[1],), -1, device=device)
        prefixes: dict[int, int] = {}
        for number, segment in enumerate(self.segments):
            if segment.candidate is None:
                prefixes[segment.start] = number
            owner[segment.start : segment.end] = number
            parent[segment.start : segment.end] = prefixes.get(segment.prefix, number)
        position = self.positions[0]

        def mask(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            related = (owner[query] == owner[key]) | (parent[query] == owner[key])
            ahead = position[query] - position[key]
            visible = related & (ahead >= 0)
            return visible if window is None else visible & (ahead < window)

        return mask


def row_of(pieces: Pieces, device: torch.device, length: int | None = None) -> Row:
    """The row of some groups; with `length` it is filled up to that many ids.

    Filling belongs to no segment, so no candidate sees it.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    last: list[int] = []
    at = 0

    def append(piece: np.ndarray, first: int) -> tuple[int, int]:
        nonlocal at
        ids.append(piece)
        positions.append(np.arange(first, first + len(piece)))
        start, at = at, at + len(piece)
        return start, at

    for prefix, own in pieces:
        begin, end = append(prefix, 0)
        if end > begin:
            segments.append(Segment(begin, begin, begin, end, None))
        for suffix in own:
            segments.append(Segment(begin, end, *append(suffix, end - begin), len(last)))
            last.append(at - 1)
    if length is not None:
        append(np.zeros(length - at, dtype=np.int64), 0)

    def flat(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).unsqueeze(0).to(device)

    return Row(flat(ids), flat(positions), tuple(segments), torch.tensor(last, device=device))
