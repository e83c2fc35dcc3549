"""Attention over a packed row on a CPU: in batched blocks, seeing only what is visible.

No mask over the whole row exists and few blocks above the diagonal are computed. The rotary
embedding is part of it, for both work on the same copies. In bf16 the products are bf16 and the
softmax is fp32; in fp32 everything is.

Which blocks there are is said by `blocks`; FlexAttention over the same row is in `layout`.

Shapes: T ids of the row, Q queries (T, or one a candidate), H heads, G key heads, D of a head; a
batch has B blocks of R queries that meet C keys.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trainer.blocks import HIDDEN, Batch, Plan, plan_of
from trainer.packed import Row


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
    cos, sin = (half[0, :, None, : half.shape[-1] // 2].float() for half in rotary)
    turns = torch.complex(cos, sin)
    asked = scale * (turns[row.last] if only_last else turns)
    plan = plan_of(row, query.shape[2], key.shape[2], window, only_last)
    found = _Attention.apply(query[0], key[0], value[0], asked, turns, plan, window)
    return found.unsqueeze(0)


class _Attention(torch.autograd.Function):
    """Both directions by hand: what autograd would keep and copy costs more than the products."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        turns_q: Tensor,
        turns_k: Tensor,
        plan: Plan,
        window: int | None,
    ) -> Tensor:
        """Outputs (Q, H * D)."""
        q = _rows(_turned(query, turns_q)).index_select(0, plan.queries)
        k = _rows(_turned(key, turns_k)).index_select(0, plan.keys)
        v = _rows(value).index_select(0, plan.keys)
        read = torch.empty_like(q)
        keep = any(ctx.needs_input_grad[:3])
        kept = []
        groups = key.shape[1]
        for batch in plan.batches:
            q_nRD, k_nCD, v_nCD, out_nRD = _of(batch, groups, q, k, v, read)
            p_nRC = _probabilities(torch.bmm(q_nRD, k_nCD.transpose(1, 2)), batch, window)
            torch.bmm(p_nRC, v_nCD, out=out_nRD)
            if keep:
                kept.append(p_nRC)
        if keep:
            ctx.save_for_backward(q, k, v, *kept)
            ctx.plan, ctx.turns, ctx.shapes = plan, (turns_q, turns_k), (query.shape, key.shape)
        return read.index_select(0, plan.answers).view(query.shape[0], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value, in their shapes."""
        q, k, v, *kept = ctx.saved_tensors
        plan: Plan = ctx.plan
        turns_q, turns_k = ctx.turns
        query_shape, key_shape = ctx.shapes
        d_read = grads[0].reshape(-1, q.shape[1]).index_select(0, plan.queries)
        d_read.index_fill_(0, plan.filling, 0)
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        parts = (q, k, v, d_read, d_q, d_k, d_v)
        for batch, p_nRC in zip(plan.batches, kept, strict=True):
            q_nRD, k_nCD, v_nCD, d_nRD, *out = _of(batch, key_shape[1], *parts)
            torch.bmm(p_nRC.transpose(1, 2), d_nRD, out=out[2])
            d_p_nRC = torch.bmm(d_nRD, v_nCD.transpose(1, 2))
            d_s_nRC = torch._softmax_backward_data(d_p_nRC, p_nRC, -1, p_nRC.dtype)
            torch.bmm(d_s_nRC.transpose(1, 2), q_nRD, out=out[1])
            torch.bmm(d_s_nRC, k_nCD, out=out[0])
        asked = d_q.index_select(0, plan.answers).index_fill_(0, plan.outside, 0)
        back_q = _turned_back(asked.view(query_shape), turns_q)
        back_k = _turned_back(_summed(d_k, plan, key_shape), turns_k)
        return back_q, back_k, _summed(d_v, plan, key_shape), None, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _of(batch: Batch, groups: int, *parts: Tensor) -> list[Tensor]:
    """A batch's blocks (B * G, rows, D) of queries and keys, in turn as the backward pass has them.

    The order is q, k, v, then gradients or outputs: of queries, and after those of queries, keys
    and values.
    """
    shapes = "qkvqqkv"
    count = batch.blocks * groups
    return [
        part[batch.query if kind == "q" else batch.key].view(count, -1, part.shape[1])
        for kind, part in zip(shapes, parts, strict=False)
    ]


def _summed(parts: Tensor, plan: Plan, shape: tuple[int, ...]) -> Tensor:
    """Gradients (T, G, D) of all keys from those of the gathered ones."""
    total, *_ = torch.embedding_bag(
        parts, plan.uses, plan.first_uses, include_last_offset=True, mode=0
    )
    return total.view(shape[1], shape[0], shape[2]).transpose(0, 1)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """X (rows, heads, D) times `turns` (rows, 1, D / 2), halves of D taken as complex numbers.

    Real and imaginary parts lie side by side in the result: queries and keys, both turned, have the
    same products in any order of D, and complex numbers multiply faster than strided halves.
    """
    halves = x.unflatten(-1, (2, -1)).transpose(-1, -2)
    pairs = halves.to(torch.float32, memory_format=torch.contiguous_format).contiguous()
    turned = torch.view_as_complex(pairs) * turns
    return torch.view_as_real(turned).to(x.dtype).view(x.shape)


def _turned_back(x: Tensor, turns: Tensor) -> Tensor:
    """The gradient of `_turned`, in the order of its argument."""
    pairs = x.to(torch.float32).contiguous().unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs) * turns.conj().resolve_conj()
    return torch.view_as_real(turned).transpose(-1, -2).to(x.dtype).reshape(x.shape)


def _probabilities(scores: Tensor, batch: Batch, window: int | None) -> Tensor:
    """The softmax (B * G, heads that share a key * R, C) of a batch's visible products."""
    rows, keys = batch.rows, batch.keys
    if batch.hidden is not None:
        shaped = scores.view(batch.blocks, -1, scores.shape[1], keys)
        shaped[..., : batch.hidden.shape[-1]] += batch.hidden.to(scores.dtype)
    shaped = scores.view(-1, rows, keys)
    if rows > 1:
        shaped[..., keys - rows :] += _later(rows, scores.dtype)
    if window is not None and keys > window:
        old = torch.ones(rows, keys, dtype=torch.bool).tril_(keys - rows - window)
        shaped.masked_fill_(old, HIDDEN)
    return torch.softmax(scores, dim=-1)


@lru_cache
def _later(rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, rows), what hides later keys, above the diagonal."""
    return torch.full((rows, rows), HIDDEN, dtype=dtype).triu_(1)
