"""Attention over a packed row on a CPU: block by block, seeing only what is visible.

Each segment's queries meet the keys of its prefix and its own in blocks of rows, so no mask over
the whole row exists, nothing is padded, and no block above the diagonal is computed. The rotary
embedding is part of it, for both work on the same copies. In bf16 the products are bf16 and the
softmax is fp32; in fp32 everything is.

Who sees whom is said by `packed.Row`; FlexAttention over the same row is in `layout`.

Shapes: T ids of the row, Q queries (T, or one a candidate), H heads, G key heads, D of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.packed import Row, Segment

ROWS = 256
"""Queries of one block; larger ones compute more that is masked, smaller ones call more often."""


class _Block(NamedTuple):
    """Queries `first:last` (of the queries' tensor) against keys `low:high` of a segment."""

    first: int
    last: int
    low: int
    high: int


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: tuple[Tensor, Tensor],
    row: Row,
    *,
    scale: float,
    window: int | None = None,
    only_last: bool = False,
) -> Tensor:
    """What every query reads, (1, Q, H * D).

    Args:
        query: (1, Q, H, D), before the rotary embedding. Q is T, or with `only_last` N: one query
            a candidate, that of its last id.
        key: (1, T, G, D), before the rotary embedding; G divides H.
        value: (1, T, G, D).
        rotary: cosine and sine (1, T, D) of the row's positions, both halves alike.
        row: the segments.
        scale: factor of the products.
        window: positions that a query sees, itself included; None for all.
        only_last: see `query`.
    """
    cos, sin = (half[0, :, : half.shape[-1] // 2].float() for half in rotary)
    picked = (cos[row.last], sin[row.last]) if only_last else (cos, sin)
    found = _Attention.apply(
        query[0], key[0], value[0], picked, (cos, sin), row.segments, scale, window, only_last
    )
    return found.unsqueeze(0)


class _Attention(torch.autograd.Function):
    """Both directions by hand: what autograd would keep and copy costs more than the products."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_q: tuple[Tensor, Tensor],
        rotary_k: tuple[Tensor, Tensor],
        segments: Sequence[Segment],
        scale: float,
        window: int | None,
        only_last: bool,
    ) -> Tensor:
        """Outputs (Q, H * D)."""
        heads, groups = query.shape[1], key.shape[1]
        repeat = heads // groups
        q_HQD = _rotated(query.transpose(0, 1), rotary_q).mul_(scale)
        k_GTD = _rotated(key.transpose(0, 1), rotary_k)
        v_GTD = value.transpose(0, 1).contiguous()
        q = q_HQD.view(groups, repeat, *q_HQD.shape[1:])
        out = torch.empty_like(q)
        keep = any(ctx.needs_input_grad[:3])
        kept: list[Tensor] = []
        for segment, blocks in _blocks(segments, window, only_last):
            keys, values = _with_prefix(k_GTD, segment), _with_prefix(v_GTD, segment)
            for block in blocks:
                probabilities = _probabilities(q, keys, block, window)
                read = torch.bmm(probabilities, values[:, block.low : block.high])
                _rows(out, block).copy_(read.view(groups, repeat, -1, read.shape[-1]))
                if keep:
                    kept.append(probabilities)
        if keep:
            ctx.save_for_backward(q_HQD, k_GTD, v_GTD, *kept)
            ctx.rotary = (rotary_q, rotary_k)
            ctx.plan = (segments, scale, window, only_last)
        flat = out.view_as(q_HQD).transpose(0, 1)
        return flat.reshape(flat.shape[0], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value, in their shapes."""
        q_HQD, k_GTD, v_GTD, *blocks_kept = ctx.saved_tensors
        segments, scale, window, only_last = ctx.plan
        groups, repeat = len(k_GTD), len(q_HQD) // len(k_GTD)
        q = q_HQD.view(groups, repeat, *q_HQD.shape[1:])
        d_out = grads[0].view(q_HQD.shape[1], len(q_HQD), -1).transpose(0, 1).contiguous()
        d_out = d_out.view_as(q)
        d_q = torch.empty_like(q)
        d_k = torch.zeros_like(k_GTD, dtype=torch.float32)
        d_v = torch.zeros_like(d_k)
        kept = iter(blocks_kept)
        for segment, blocks in _blocks(segments, window, only_last):
            keys, values = _with_prefix(k_GTD, segment), _with_prefix(v_GTD, segment)
            for block in blocks:
                low, high = block.low, block.high
                probabilities, d_read = next(kept), _flat(d_out, block)
                _add(d_v, segment, block, torch.bmm(probabilities.transpose(1, 2), d_read))
                d_probabilities = torch.bmm(d_read, values[:, low:high].transpose(1, 2))
                d_scores = torch._softmax_backward_data(
                    d_probabilities, probabilities, -1, probabilities.dtype
                )
                _add(d_k, segment, block, torch.bmm(d_scores.transpose(1, 2), _flat(q, block)))
                d_rows = torch.bmm(d_scores, keys[:, low:high])
                _rows(d_q, block).copy_(d_rows.view(groups, repeat, -1, d_rows.shape[-1]))
        (cos_q, sin_q), (cos_k, sin_k) = ctx.rotary
        back_q = _rotated(d_q.view_as(q_HQD), (cos_q * scale, -sin_q * scale))
        back_k = _rotated(d_k, (cos_k, -sin_k)).to(k_GTD.dtype)
        gradients = (back_q, back_k, d_v.to(v_GTD.dtype))
        return (*(g.transpose(0, 1) for g in gradients), None, None, None, None, None, None)


def _rotated(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """X (heads, rows, D) turned by the angles whose cosine and sine (rows, D / 2) are given."""
    cos, sin = rotary
    out = torch.empty(x.shape, dtype=x.dtype)
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def _blocks(
    segments: Sequence[Segment], window: int | None, only_last: bool
) -> Iterator[tuple[Segment, list[_Block]]]:
    """Every segment's blocks of queries and the keys they meet, counted from its prefix's start."""
    for segment in segments:
        before = segment.prefix_end - segment.prefix
        size = segment.end - segment.start
        if not only_last:
            starts = list(range(before, before + size, ROWS))
            offset = segment.start - before
        elif segment.candidate is not None:
            starts = [before + size - 1]
            offset = segment.candidate - starts[0]
        else:  # nobody asks for what a prefix's last layer reads
            continue
        ends = [*starts[1:], before + size]
        blocks = []
        for start, end in zip(starts, ends, strict=True):
            low = 0 if window is None else max(0, start - window + 1)
            blocks.append(_Block(start + offset, end + offset, low, end))
        yield segment, blocks


def _with_prefix(x: Tensor, segment: Segment) -> Tensor:
    """Keys or values (G, prefix + own, D) that a segment sees."""
    prefix, prefix_end, start, end, _ = segment
    if prefix_end == start or prefix == prefix_end:
        return x[:, prefix if prefix_end == start else start : end]
    return torch.cat([x[:, prefix:prefix_end], x[:, start:end]], dim=1)


def _add(total: Tensor, segment: Segment, block: _Block, part: Tensor) -> None:
    """Add a block's gradients (G, keys, D) to those of the prefix's and the segment's ids."""
    prefix, prefix_end, start, _, _ = segment
    inside = max(0, min(prefix_end - prefix, block.high) - block.low)
    if inside:
        total[:, prefix + block.low : prefix + block.low + inside] += part[:, :inside]
    first = start + max(0, block.low - (prefix_end - prefix))
    total[:, first : first + part.shape[1] - inside] += part[:, inside:]


def _rows(x: Tensor, block: _Block) -> Tensor:
    return x[:, :, block.first : block.last]


def _flat(x: Tensor, block: _Block) -> Tensor:
    """A block's rows (G, repeat * rows, D): the heads that share keys one below the other."""
    rows = _rows(x, block)
    return rows.reshape(len(rows), -1, rows.shape[-1])


def _probabilities(q: Tensor, keys: Tensor, block: _Block, window: int | None) -> Tensor:
    """The softmax (G, repeat * rows, keys) of a block's visible products."""
    scores = torch.bmm(_flat(q, block), keys[:, block.low : block.high].transpose(1, 2))
    rows, size = block.last - block.first, block.high - block.low
    if rows > 1 or window is not None:
        shaped = scores.view(len(scores), -1, rows, size)
        shaped[..., size - rows :] += _triangle(ROWS, scores.dtype)[:rows, :rows]
        hidden = 0 if window is None else size - window  # keys the last row does not see any more
        if hidden > 0:
            old = torch.ones(rows, hidden, dtype=torch.bool).tril_(hidden - rows)
            shaped[..., :hidden].masked_fill_(old, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


@lru_cache
def _triangle(rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, rows), minus infinity above the diagonal."""
    return torch.full((rows, rows), -torch.inf, dtype=dtype).triu_(1)
