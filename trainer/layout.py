"""How the sequences of several groups are laid out in memory; every layout gives the same scores.

`separate` runs each candidate's whole sequence and is the reference for all others. `shared` runs
the prefix that a group's candidates have in common once, and lets each candidate's remaining ids
attend to its keys and values: the same arithmetic, without repeating the prefix K times.

Shapes: G groups, N candidates in all, P ids of the longest prefix, S of the longest suffix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

Pieces = Sequence[tuple[np.ndarray, Sequence[np.ndarray]]]
"""Per group the ids of the shared prefix, and of each candidate what follows it."""


def separate(network: PreTrainedModel, pieces: Pieces) -> Tensor:
    """Scores (N,) in fp32, one padded row per candidate."""
    rows = [np.concatenate([prefix, suffix]) for prefix, own in pieces for suffix in own]
    ids, lengths = padded(rows, network.device)
    hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return _head(network, hidden, lengths)


def shared(network: PreTrainedModel, pieces: Pieces) -> Tensor:
    """Scores (N,) in fp32, each group's prefix run once.

    Positions go on after the prefix, and a mask hides what pads shorter prefixes.
    """
    if min(len(prefix) for prefix, _ in pieces) == 0 or slides(network):
        return separate(network, pieces)
    device = network.device
    prefix_GP, prefix_lengths = padded([prefix for prefix, _ in pieces], device)
    suffix_NS, suffix_lengths = padded([suffix for _, own in pieces for suffix in own], device)
    counts = [len(own) for _, own in pieces]
    group = torch.from_numpy(np.repeat(np.arange(len(pieces)), counts)).to(device)

    cache = _prefix_cache(network, prefix_GP)
    if len(set(counts)) == 1:
        cache.batch_repeat_interleave(counts[0])  # the same, and its gradient is cheaper
    else:
        cache.batch_select_indices(group)

    start_N1 = prefix_lengths[group].unsqueeze(1)
    step_S = torch.arange(suffix_NS.shape[1], device=device)
    sees_prefix_NP = torch.arange(prefix_GP.shape[1], device=device) < start_N1
    sees_suffix_SS = step_S <= step_S.unsqueeze(1)
    n, s = suffix_NS.shape
    mask = torch.cat(
        [sees_prefix_NP.unsqueeze(1).expand(n, s, -1), sees_suffix_SS.expand(n, s, s)], dim=-1
    )
    hidden = network.base_model(
        input_ids=suffix_NS,
        attention_mask=mask.unsqueeze(1),
        position_ids=start_N1 + step_S,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return _head(network, hidden, suffix_lengths)


class _Filled(Exception):  # noqa: N818 - a signal, not a fault
    """The last layer's keys and values are there."""


class _PrefixCache(DynamicCache):
    """Ends the forward pass once it holds every layer's keys and values.

    Nothing that a prefix's last layer computes after them is read by anyone.
    """

    filling = True

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in the parent class, whose argument names these are."""
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.filling and layer_idx == len(self.layers) - 1:
            raise _Filled
        return found


def _prefix_cache(network: PreTrainedModel, prefix_GP: Tensor) -> DynamicCache:
    cache = _PrefixCache(config=network.config)
    with suppress(_Filled):
        network.base_model(input_ids=prefix_GP, past_key_values=cache, use_cache=True)
    cache.filling = False
    return cache


LAYOUTS: dict[str, Callable[[PreTrainedModel, Pieces], Tensor]] = {
    "separate": separate,
    "shared": shared,
}


@contextmanager
def precision(network: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the network in `fp32`, or under autocast in `bf16`; `auto` is bf16 where it is fast.

    On a CPU the fused attention is slower in bf16 than in fp32, above all backwards, so there
    attention stays in fp32: 1.5 times the pairs a second for a model of width 128.
    """
    if name == "fp32" or (name == "auto" and not _fast_bf16(network.device)):
        yield
        return
    before = network.config._attn_implementation
    cpu = network.device.type == "cpu" and before == "sdpa"
    if cpu:
        network.set_attn_implementation(_FP32_ATTENTION)
    try:
        with torch.autocast(network.device.type, torch.bfloat16):
            yield
    finally:
        if cpu:
            network.set_attn_implementation(before)


def _fast_bf16(device: torch.device) -> bool:
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


_FP32_ATTENTION = "sdpa_in_fp32"
AttentionInterface.register(_FP32_ATTENTION, _attention_in_fp32)
AttentionMaskInterface.register(_FP32_ATTENTION, sdpa_mask)


def slides(network: PreTrainedModel) -> bool:
    """Whether some layer sees only a window: padding inside the cache would shift it."""
    return any("sliding" in kind for kind in getattr(network.config, "layer_types", None) or [])


def padded(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows filled up on the right, and their lengths.

    Causal attention never looks to the right, so the filling needs neither mask nor pad token.
    """
    lengths = [len(row) for row in rows]
    ids = np.zeros((len(rows), max(lengths)), dtype=np.int64)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(ids).to(device), torch.tensor(lengths, device=device)


def _head(network: PreTrainedModel, hidden: Tensor, lengths: Tensor) -> Tensor:
    """The scalar head on each row's last own id, in fp32 whatever ran before."""
    last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    with torch.autocast(hidden.device.type, enabled=False):
        weight = cast(nn.Linear, network.score).weight
        return nn.functional.linear(last.float(), weight.float()).squeeze(-1)
