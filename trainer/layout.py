"""How the sequences of several groups are laid out in memory; every layout gives the same scores.

`separate` runs each candidate's whole sequence and is the reference for all others. `shared` runs
the prefix that a group's candidates have in common once, in one row without padding: the same
arithmetic, without repeating the prefix K times. `flex` is the same row filled up to a fixed
length, for FlexAttention's kernels.

What a row is belongs to `packed`, how a CPU runs it fast to `decoder` and `attention`.

Shapes: N candidates in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from trainer import decoder
from trainer.blocks import few_sizes
from trainer.packed import Pieces, Row, row_of

ROW_STEP = 1024
"""A row of `flex` is as long as the next multiple of this, so that few shapes are compiled."""
NARROWEST = 16
"""Elements that a head must have for FlexAttention's kernels on a GPU."""


def separate(network: PreTrainedModel, pieces: Pieces) -> Tensor:
    """Scores (N,) in fp32, one padded row per candidate."""
    rows = [np.concatenate([prefix, suffix]) for prefix, own in pieces for suffix in own]
    ids, lengths = padded(rows, network.device)
    hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return _head(network, hidden[torch.arange(len(rows), device=hidden.device), lengths - 1])


def shared(network: PreTrainedModel, pieces: Pieces) -> Tensor:
    """Scores (N,) in fp32, each group's prefix run once."""
    if taken("shared", network) == "flex":
        return flex(network, pieces)
    if network.device.type == "cpu" and decoder.ready(network):
        row = row_of(pieces, network.device, length=ids_run("shared", pieces))
        return _head(network, decoder.last_hidden(network, row))
    rows = [row_of([group], network.device) for group in pieces]  # a mask over all would be large
    return torch.cat([_over_masks(network, row, _dense_mask) for row in rows])


def flex(network: PreTrainedModel, pieces: Pieces) -> Tensor:
    """Scores (N,) in fp32, through FlexAttention over one row of fixed length.

    FlexAttention has no backward pass on a CPU, and on a GPU no kernels for very narrow heads;
    there the same mask, dense, takes its place.
    """
    row = row_of(pieces, network.device, length=ids_run("flex", pieces))
    if not _by_kernels("flex", network):
        return _over_masks(network, row, _dense_mask)
    with _attention(network, _FLEX):
        return _over_masks(network, row, _block_mask)


def taken(layout: str, network: PreTrainedModel) -> str:
    """The layout that is run where `layout` is asked for: `flex` for `shared` on a GPU."""
    return "flex" if layout == "shared" and _by_kernels(layout, network) else layout


def _by_kernels(layout: str, network: PreTrainedModel) -> bool:
    """Whether a layout runs FlexAttention's own kernels here."""
    if network.device.type == "cpu":
        return layout == "flex" and not torch.is_grad_enabled()
    wide = decoder.head_width(network.config) >= NARROWEST
    return layout in ("shared", "flex") and wide


def _over_masks(
    network: PreTrainedModel, row: Row, make: Callable[[Row, int | None], Any]
) -> Tensor:
    """Scores through the network as transformers wrote it, with a mask for each kind of layer."""
    windows = decoder.windows(network.config)
    masks = {window: make(row, window) for window in set(windows)}
    kinds: Any = getattr(network.config, "layer_types", None)
    mask: Any = masks[windows[0]]
    if len(masks) > 1:
        mask = {kind: masks[window] for kind, window in zip(kinds, windows, strict=True)}
    hidden = network.base_model(
        input_ids=row.ids, position_ids=row.positions, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return _head(network, hidden[0, row.last])


def _block_mask(row: Row, window: int | None) -> Any:
    length = row.ids.shape[1]
    return create_block_mask(row.sees(window), 1, None, length, length, device=row.ids.device)


def _dense_mask(row: Row, window: int | None) -> Tensor:
    """Whom every query sees, (1, 1, T, T)."""
    place = torch.arange(row.ids.shape[1], device=row.ids.device)
    return row.sees(window)(place, place, place.unsqueeze(1), place.unsqueeze(0))[None, None]


def ids_run(layout: str, pieces: Pieces) -> int:
    """Ids that a layout runs for these groups, padding included."""
    if layout == "separate":
        lengths = [len(prefix) + len(suffix) for prefix, own in pieces for suffix in own]
        return len(lengths) * max(lengths)
    used = sum(len(prefix) + sum(map(len, own)) for prefix, own in pieces)
    return -(-used // ROW_STEP) * ROW_STEP if layout == "flex" else few_sizes(used, 32, 1)


LAYOUTS: dict[str, Callable[[PreTrainedModel, Pieces], Tensor]] = {
    "separate": separate,
    "shared": shared,
    "flex": flex,
}


@torch.no_grad()
def difference(network: PreTrainedModel, layout: str, pieces: Pieces) -> float:
    """How far a layout's scores are from `separate`'s, as a share of their size (or of 1)."""
    with _fixed_head(network):
        return _apart(LAYOUTS[layout](network, pieces), _one_by_one(network, pieces))


@torch.no_grad()
def rounding(network: PreTrainedModel, pieces: Pieces) -> float:
    """How far scores of `separate` are from those in float64, as a share of their size (or of 1).

    Memory for the weights in float64 is needed; those in fp32 come back unchanged.
    """
    with _fixed_head(network):
        found = _one_by_one(network, pieces)
        network.double()
        try:
            return _apart(found, _one_by_one(network, pieces))
        finally:
            network.float()


@contextmanager
def _fixed_head(network: PreTrainedModel) -> Iterator[None]:
    """A head that tells states apart, for a new one is all zeros."""
    head = cast(nn.Linear, network.score).weight
    kept = head.detach().clone()
    generator = torch.Generator().manual_seed(0)
    head.copy_(torch.randn(head.shape, generator=generator) / head.shape[-1] ** 0.5)
    try:
        yield
    finally:
        head.copy_(kept)


def _one_by_one(network: PreTrainedModel, pieces: Pieces) -> Tensor:
    """Scores (N,) of `separate`; a long group's sequences, side by side, may not fit."""
    alone = [[(prefix, [own])] for prefix, suffixes in pieces for own in suffixes]
    return torch.cat([separate(network, each) for each in alone])


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


@contextmanager
def precision(network: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the network in `fp32`, or under autocast in `bf16`; `auto` is bf16 where it is fast.

    On a CPU the fused attention is slower in bf16 than in fp32, above all backwards, so there
    attention stays in fp32: 1.5 times the pairs a second for a model of width 128.
    """
    if not _half(network, name):
        yield
        return
    with (
        _attention(network, _in_fp32(network)),
        torch.autocast(network.device.type, torch.bfloat16),
    ):
        yield


@contextmanager
def attention_kept(network: PreTrainedModel, layout: str, precision: str) -> Iterator[None]:
    """Hold the attention that a forward pass takes until its backward pass is over.

    Checkpointed layers run again there, after layout and precision have put back what was before.
    """
    if _by_kernels(layout, network):
        name = _FLEX
    else:
        name = _in_fp32(network) if _half(network, precision) else _chosen(network)
    with _attention(network, name):
        yield


@contextmanager
def _attention(network: PreTrainedModel, name: str) -> Iterator[None]:
    """Another attention implementation for a while."""
    before = _chosen(network)
    if name != before:
        network.set_attn_implementation(name)
    try:
        yield
    finally:
        if name != before:
            network.set_attn_implementation(before)


def _chosen(network: PreTrainedModel) -> str:
    return str(network.config._attn_implementation)


def _in_fp32(network: PreTrainedModel) -> str:
    """The attention implementation under autocast."""
    before = _chosen(network)
    return _FP32_ATTENTION if network.device.type == "cpu" and before == "sdpa" else before


def _half(network: PreTrainedModel, precision: str) -> bool:
    return precision == "bf16" or (precision == "auto" and fast_bf16(network.device))


def fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16; elsewhere it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _attention_in_fp32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    with torch.autocast(query.device.type, enabled=False):
        wide = (query.float(), key.float(), value.float())
        found, _ = sdpa_attention_forward(module, *wide, mask, **kwargs)
    return found.to(query.dtype), None


_FLEX = "flex_attention"
_FP32_ATTENTION = "sdpa_in_fp32"
AttentionInterface.register(_FP32_ATTENTION, _attention_in_fp32)
AttentionMaskInterface.register(_FP32_ATTENTION, sdpa_mask)


def padded(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows filled up on the right, and their lengths.

    Causal attention never looks to the right, so the filling needs neither mask nor pad token.
    """
    lengths = [len(row) for row in rows]
    ids = np.zeros((len(rows), max(lengths)), dtype=np.int64)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(ids).to(device), torch.tensor(lengths, device=device)


def _head(network: PreTrainedModel, last: Tensor) -> Tensor:
    """The scalar head on the last ids' states (N, E), in fp32 whatever ran before."""
    with torch.autocast(last.device.type, enabled=False):
        weight = cast(nn.Linear, network.score).weight
        return nn.functional.linear(last.float(), weight.float()).squeeze(-1)
