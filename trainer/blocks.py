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

TILE = 64
"""Queries of one block: larger ones compute more that is hidden, smaller ones do more calls."""
CACHED = 1 << 18
"""Products (over all heads) of one batch that stay in a processor's own cache."""
CALL = 1 << 13
"""Products that take as long as it takes to start one batch more."""


class Block(NamedTuple):
    """Queries `query:query + rows` of the queries' tensor and the keys `low:high` they meet.

    Keys are counted from the start of the segment's prefix.
    """

    segment: Segment
    query: int
    rows: int
    low: int
    high: int


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
        before = segment.prefix_end - segment.prefix
        size = segment.end - segment.start
        if only_last and segment.candidate is None:
            continue  # nobody asks for what a prefix's last layer reads
        tile = -(-size // -(-size // TILE))  # blocks of one segment are about equal
        for first in [size - 1] if only_last else range(0, size, tile):
            last = min(first + tile, size)
            query = segment.candidate if only_last else segment.start + first
            low = 0 if window is None else max(0, before + first - window + 1)
            yield Block(segment, query, last - first, low, before + last)


def few_sizes(size: int, share: int = 8, least: int = 16) -> int:
    """The next of few sizes: the multiples of `least` and of a share of the power of two below."""
    step = max(least, (1 << size.bit_length()) // 2 // share)
    return -(-size // step) * step


def _batched(blocks: list[Block], heads: int) -> Iterator[tuple[list[Block], int, int]]:
    """Blocks in batches with their rows and keys; a batch has a power of two of them."""
    shaped = [(few_sizes(b.rows) if b.rows > 1 else 1, b.high - b.low, b) for b in blocks]
    shaped.sort(key=lambda s: (-s[0], -s[1], s[2].query))
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
    repeat = heads // groups
    batches, queries, keys, read, seen, stride = [], [], [], [], [], []
    at_query, at_key = 0, 0
    for part, rows, columns in _batched(blocks, heads):
        table = np.array(
            [
                (
                    b.query,
                    b.rows,
                    b.low,
                    b.high,
                    b.segment.prefix,
                    b.segment.start,
                    b.segment.prefix_end - b.segment.prefix,
                )
                for b in part
            ]
        ).T[:, :, None]
        query, size, low, high, prefix, start, before = table
        ask = query + size - rows + np.arange(rows)  # (B, R)
        place = high - columns + np.arange(columns)  # (B, C)
        real_ask, real_key = ask >= query, place >= low
        place = np.maximum(place, low)
        met = np.where(place < before, prefix + place, start + place - before)
        head = np.arange(heads).reshape(groups, repeat, 1)
        queries.append((np.maximum(ask, query)[:, None, None] * heads + head).ravel())
        keys.append((met[:, None] * groups + np.arange(groups)[:, None]).ravel())
        read.append(np.broadcast_to(real_ask[:, None, None], (len(part), groups, repeat, rows)))
        # where a key of head 0 lies among the gathered ones; another head's lies `columns` further
        base = at_key + np.arange(len(part))[:, None] * groups * columns + np.arange(columns)
        seen.append(np.stack([met[real_key], base[real_key]]))
        stride.append(np.full(seen[-1].shape[1], columns))
        fills = columns - (high - low)
        most = int(fills.max())
        hidden = None
        if most:
            hidden = torch.zeros(len(part), 1, 1, most)
            hidden.masked_fill_(torch.from_numpy(np.arange(most) < fills)[:, None, None], HIDDEN)
        next_query, next_key = at_query + queries[-1].size, at_key + keys[-1].size
        batches.append(
            Batch(
                len(part),
                rows,
                columns,
                slice(at_query, next_query),
                slice(at_key, next_key),
                hidden,
            )
        )
        at_query, at_key = next_query, next_key
    all_queries = np.concatenate(queries)
    real = np.concatenate([r.ravel() for r in read])
    answers = np.full(asking * heads, -1)
    answers[all_queries[real]] = np.flatnonzero(real)
    rows_met, lies = np.concatenate(seen, axis=1)
    order = np.argsort(rows_met, kind="stable")
    uses = lies[order] + np.arange(groups)[:, None] * np.concatenate(stride)[order]
    counts = np.bincount(rows_met, minlength=total)
    ends = np.concatenate([[0], np.cumsum(np.tile(counts, groups))])
    outside = np.flatnonzero(answers < 0)
    answers[outside] = 0
    as_tensor = torch.from_numpy
    return Plan(
        tuple(batches),
        as_tensor(all_queries),
        as_tensor(np.concatenate(keys)),
        as_tensor(np.flatnonzero(~real)),
        as_tensor(answers),
        as_tensor(outside),
        as_tensor(uses.ravel()),
        as_tensor(ends),
    )


HIDDEN = -1e30
"""Added to a product that nobody may see; finite, for a row of filling may see nothing at all."""
