"""How the sequences of several groups are laid out in memory; every layout gives the same scores.

`separate` runs each candidate's whole sequence and is the reference for all others. `shared` runs
the prefix that a group's candidates have in common once, and lets each candidate's remaining ids
attend to its keys and values: the same arithmetic, without repeating the prefix K times.

Shapes: G groups, N candidates in all, P ids of the longest prefix, S of the longest suffix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

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
    count = torch.tensor([len(own) for _, own in pieces], device=device)
    group = torch.repeat_interleave(torch.arange(len(pieces), device=device), count)

    cache = DynamicCache(config=network.config)
    network.base_model(input_ids=prefix_GP, past_key_values=cache, use_cache=True)
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


LAYOUTS: dict[str, Callable[[PreTrainedModel, Pieces], Tensor]] = {
    "separate": separate,
    "shared": shared,
}


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
