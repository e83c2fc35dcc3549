"""The optimiser and its learning-rate schedule: AdamW, linear warm-up, cosine to a floor."""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn


class OptimSettings(BaseModel):
    """Values of the released recipe, but for the learning rate, which depends on the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float = Field(default=1e-3, gt=0)
    floor: float = Field(default=0.1, ge=0, le=1)
    warmup: float = Field(default=0.03, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)


def adamw(network: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over all trainable parameters, fused into one kernel."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate(done: float, settings: OptimSettings) -> float:
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
