"""What decides a next-token training. Light to import: no torch here."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LanguageModelSettings(BaseModel):
    """Size of a decoder (unused when training starts from a checkpoint) and how it is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden: int = Field(default=160, gt=0, description="width; vLLM wants 32, 64, ... per head")
    layers: int = Field(default=2, gt=0)
    heads: int = Field(default=5, gt=0)
    intermediate: int = Field(default=512, gt=0)
    init: float = Field(default=0.1, gt=0, le=1, description="deviation of the first weights")
    context: int = Field(default=1024, gt=1, description="ids; longer documents are cut up")
    steps: int = Field(default=200, gt=0)
    batch_tokens: int = Field(default=1024, gt=0, description="ids per step, padding included")
    learning_rate: float = Field(default=5e-3, gt=0)
    final_share: float = Field(default=0.1, ge=0, le=1, description="of the rate, at the end")
    warmup: float = Field(default=0.05, ge=0, le=1, description="share of the steps")
    weight_decay: float = Field(default=0.01, ge=0)
    bf16: bool = False
    seed: int = 0
    save_at: tuple[int, ...] = Field(default=(), description="steps that out/step-N holds")
