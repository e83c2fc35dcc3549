"""How attention over a packed row is cut into batched products of few shapes.

Every segment's queries are cut into blocks of at most `TILE` rows, and blocks that meet about as
many keys are computed together in one batch, filled up to the same shape. Batches are small enough
for a processor's cache. Their shapes are few on purpose: a bf16 product of a shape not seen before
costs a CPU as much as 50 of a known one, for its code is generated first.

In a block the last query and the last key are the last row and column, so what the causal order
and a window hide is the same for a whole batch. Filling is at the front: such keys are hidden, such
queries are read by nobody.

Here are only indices; the arithmetic is in `attention`, the row itself in `packed`.

Shapes: H heads, G key heads; a batch has B blocks of R queries that meet C keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.packed import Row, Segment

TILE = 128
"""Queries of one block: larger ones compute more that is hidden, smaller ones copy more keys."""
CACHED = 1 << 18
"""Products (over all heads) of one batch that stay in a processor's own cache."""
CALL = 1 << 13
"""Products that take as long as it takes to start one batch more."""

HIDDEN = -1e30
"""Added to a product that nobody may see; finite, for a row of filling may see nothing at all."""


class Block(NamedTuple):
    """Queries `query:query + rows` of the queries' tensor and the keys `low:high` they meet.

    Keys are counted from the start of the prefix, `before` ids long, at `prefix` in the row; after
    it they go on at `start`.
    """

    query: int
    rows: int
    low: int
    high: int
    prefix: int
    before: int
    start: int


@dataclass(frozen=True)
class Batch:
    """B blocks of one shape, and where their ids lie in what `Plan` gathers."""

    blocks: int
    rows: int
    keys: int
    query: slice
    key: slice
    hidden: Tensor | None
    """(B, 1, filling), minus much where a key is filling, for the first columns; None for none."""


@dataclass(frozen=True)
class Plan:
    """Which rows of all queries' and keys' heads (..., D) go into which batch, and back again."""

    batches: tuple[Batch, ...]
    queries: Tensor
    """Per gathered query its row among (Q * H)."""
    keys: Tensor
    """Per gathered key its row among (T * G)."""
    filling: Tensor
    """Gathered queries that nobody reads."""
    answers: Tensor
    """Per row of (Q * H) where it lies among the gathered queries; filling of the row at 0."""
    outside: Tensor
    """Rows of (Q * H) that belong to no segment."""
    uses: Tensor
    """Gathered keys, those of the same row of (G * T) together."""
    first_uses: Tensor
    """Per row of (G * T) where its part of `uses` begins."""


def plan_of(row: Row, heads: int, groups: int, window: int | None, only_last: bool) -> Plan:
    """The plan for a kind of layer, made once per row.

    Args:
        row: the segments.
        heads: H.
        groups: G, which divides H.
        window: positions that a query sees, itself included; None for all.
        only_last: whether only each candidate's last id asks.
    """
    kind = (heads, groups, window, only_last)
    if kind not in row.plans:
        count = len(row.last) if only_last else row.ids.shape[1]
        blocks = list(_blocks(row.segments, window, only_last))
        row.plans[kind] = _plan(blocks, heads, groups, count, row.ids.shape[1])
    return row.plans[kind]


def _blocks(segments: Sequence[Segment], window: int | None, only_last: bool) -> Iterator[Block]:
    """Every segment's blocks of queries and the keys they meet."""
    for segment in segments:
        before, size = segment.prefix_end - segment.prefix, segment.end - segment.start
        tile = -(-size // -(-size // TILE))  # blocks of one segment are about equal
        asked = [(segment.start + first, first) for first in range(0, size, tile)]
        if only_last:  # nobody asks for what a prefix's last layer reads
            asked = [] if segment.candidate is None else [(segment.candidate, size - 1)]
        for query, first in asked:
            low = 0 if window is None else max(0, before + first - window + 1)
            last = min(first + tile, size)
            high = before + last
            yield Block(query, last - first, low, high, segment.prefix, before, segment.start)


def few_sizes(size: int, share: int = 8, least: int = 16) -> int:
    """The next of few sizes: the multiples of `least` and of a share of the power of two below."""
    step = max(least, (1 << size.bit_length()) // 2 // share)
    return -(-size // step) * step


def _batched(blocks: list[Block], heads: int) -> Iterator[tuple[list[Block], int, int]]:
    """Blocks in batches with their rows and keys; a batch has a power of two of them."""
    shaped = [(few_sizes(b.rows) if b.rows > 1 else 1, b.high - b.low, b) for b in blocks]
    shaped.sort(key=lambda s: (-s[0], -s[1], s[2]))
    at = 0
    while at < len(shaped):
        rows, keys = shaped[at][0], few_sizes(shaped[at][1])
        each = heads * rows * keys
        end, wasted = at, 0
        while end < len(shaped) and shaped[end][0] == rows and (end - at + 1) * each <= CACHED:
            wasted += heads * rows * (keys - shaped[end][1])
            if wasted > max(CALL, (end - at) * each // 8):
                break
            end += 1
        count = 1 << (max(1, end - at).bit_length() - 1)
        yield [block for *_, block in shaped[at : at + count]], rows, keys
        at += count


def _plan(blocks: list[Block], heads: int, groups: int, asking: int, total: int) -> Plan:
    """The plan for these blocks, of `asking` queries and `total` ids of the row."""
    group_G11 = np.arange(groups)[:, None, None]
    head_GH1 = np.arange(heads).reshape(groups, -1, 1)
    batches, queries, real_queries, keys, uses = [], [], [], [], []
    at_query, at_key = 0, 0
    for part, rows, columns in _batched(blocks, heads):
        query, size, low, high, prefix, before, start = np.array(part).T[:, :, None]
        asks_BR = np.arange(rows) + query + size - rows
        place_BC = np.maximum(np.arange(columns) + high - columns, low)
        met_BC = np.where(place_BC < before, prefix + place_BC, start + place_BC - before)
        queries.append(np.maximum(asks_BR, query)[:, None, None] * heads + head_GH1)
        real_queries.append(np.broadcast_to((asks_BR >= query)[:, None, None], queries[-1].shape))
        keys.append(met_BC[:, None] * groups + group_G11[:, 0])
        lies_GBC = at_key + np.arange(keys[-1].size).reshape(keys[-1].shape).transpose(1, 0, 2)
        filling_B1 = columns - (high - low)
        real_BC = np.arange(columns) >= filling_B1
        uses.append(np.vstack([met_BC[real_BC], lies_GBC[:, real_BC]]))
        next_query, next_key = at_query + queries[-1].size, at_key + keys[-1].size
        batches.append(
            Batch(
                len(part),
                rows,
                columns,
                slice(at_query, next_query),
                slice(at_key, next_key),
                _hidden(filling_B1),
            )
        )
        at_query, at_key = next_query, next_key
    asks, real = (np.concatenate([x.ravel() for x in parts]) for parts in (queries, real_queries))
    answers = np.full(asking * heads, -1)
    answers[asks[real]] = np.flatnonzero(real)
    met, *lies = np.concatenate(uses, axis=1)
    order = np.argsort(met, kind="stable")
    counts = np.tile(np.bincount(met, minlength=total), groups)
    return Plan(
        tuple(batches),
        queries=torch.from_numpy(asks),
        keys=torch.from_numpy(np.concatenate([x.ravel() for x in keys])),
        filling=torch.from_numpy(np.flatnonzero(~real)),
        answers=torch.from_numpy(answers.clip(min=0)),
        outside=torch.from_numpy(np.flatnonzero(answers < 0)),
        uses=torch.from_numpy(np.concatenate([of_group[order] for of_group in lies])),
        first_uses=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
    )


def _hidden(filling_B1: np.ndarray) -> Tensor | None:
    """What hides the first columns where they are filling."""
    most = int(filling_B1.max())
    if not most:
        return None
    fills_BF = torch.from_numpy(np.arange(most) < filling_B1)
    return torch.zeros(len(fills_BF), 1, 1, most).masked_fill_(fills_BF[:, None, None], HIDDEN)
