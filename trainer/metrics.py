"""What a training run says of itself every interval: one line of numbers, and where lines go.

Lines go to `metrics.jsonl` (see `resume`) and, if asked for, to TensorBoard's event files in the
same folder. A curve for people is drawn by who reads them.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from trainer import decoder

SUMS = (
    "loss",
    "correct",
    "margin",
    "pairs",
    "tokens",
    "official",
    "ids",
    "needed",
    "run",
    "seen",
)
"""Summed over groups, then over processes: `tokens` of sequences that stand alone, `official` ids
that the official code would run (each pair's two sequences whole), `ids` with prefixes counted
once, `run` by the layout and `needed` of these without padding, `seen` pairs of ids of which one
sees the other."""


def no_sums() -> dict[str, float]:
    """An interval in which nothing has happened."""
    return dict.fromkeys((*SUMS, "grad_norm", "steps", "since"), 0.0)


def line_of(sums: Mapping[str, float], seconds: float, work: Work) -> dict[str, Any]:
    """The means and rates of an interval of that many seconds."""
    seconds = max(seconds, 1e-9)
    operations = work.per_id * sums["ids"] + work.per_pair * sums["seen"]
    return {
        "loss": sums["loss"] / sums["pairs"],
        "accuracy": sums["correct"] / sums["pairs"],
        "margin": sums["margin"] / sums["pairs"],
        "grad_norm": sums["grad_norm"] / sums["steps"],
        "pairs_per_s": round(sums["pairs"] / seconds, 2),
        "tokens_per_s": round(sums["tokens"] / seconds, 1),
        "official_tokens_per_s": round(sums["official"] / seconds, 1),
        "padding": round(1 - sums["needed"] / max(sums["run"], 1.0), 4),
        "memory_bytes": peak_memory(),
        "flop_per_s": round(operations / seconds),
    }


class Work:
    """Operations of a training step: forward and backward, by id and by pair of ids.

    Six per weight and id, twelve per layer, pair and element of the heads (the usual count for
    decoders); `separate` runs more than is counted, for a prefix counts once.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        embedding = cast(nn.Embedding, network.get_input_embeddings()).weight.numel()
        config = network.config
        self.per_id = 6.0 * (sum(p.numel() for p in network.parameters()) - embedding)
        width = config.num_attention_heads * decoder.head_width(config)
        self.per_pair = 12.0 * config.num_hidden_layers * width


def peak_memory() -> int:
    """The most bytes that this process has held so far: on its GPU if it has one, else of RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class EventFiles:
    """TensorBoard's event files in a run's folder; imported only if they are asked for."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step)

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line's numbers as curves over steps."""
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(f"train/{name}", value, line["step"])

    def close(self) -> None:
        """Write out what is held back."""
        self._writer.close()
