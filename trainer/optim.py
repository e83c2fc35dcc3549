"""The optimiser and its learning-rate schedule: AdamW, linear warm-up, cosine to a floor."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import nn

from trainer.settings import TrainSettings


def adamw(network: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over all trainable parameters, fused into one kernel."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class Schedule(Protocol):
    """What a rate depends on."""

    @property
    def lr(self) -> float:
        """The highest rate."""
        ...

    @property
    def warmup(self) -> float:
        """Share of the training that the rise takes."""
        ...

    @property
    def floor(self) -> float:
        """The last rate as a share of the highest."""
        ...


def learning_rate(done: float, settings: Schedule) -> float:
    """The rate of the step that ends at a share `done` (0..1) of the training.

    It rises from 0 in a line, as in the released recipe, then falls along a cosine to the floor.
    """
    done = min(max(done, 0.0), 1.0)
    if done < settings.warmup:
        share = done / settings.warmup
    else:
        along = (done - settings.warmup) / (1 - settings.warmup)
        share = settings.floor + (1 - settings.floor) * (1 + math.cos(math.pi * along)) / 2
    return settings.lr * share
