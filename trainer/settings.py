"""What decides a training run, and reading it from YAML and from `name=value` words.

Light to import: no torch here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from trainer.errors import TrainerError
from trainer.files import read_object
from trainer.recipes import recipe_file

_ADVICE = "give a YAML file with a mapping of setting names to values"


def _listed(value: Any) -> Any:
    """On the command line several values are one word: `0.9,0.95`."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[]()").split(",")]
    return value


_WORDS = BeforeValidator(_listed)


class LoraSettings(BaseModel):
    """Low-rank adapters instead of all weights; `trainer.lora` says how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1, description="adapters count alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Annotated[tuple[str, ...], _WORDS] = Field(
        default=("all-linear",), min_length=1, description="names of linear layers"
    )
    keep: bool = Field(default=False, description="also write the adapters alone, for peft")


class TrainSettings(BaseModel):
    """Everything that decides what a training run computes, and how often it logs and saves.

    The run ends with whichever of `epochs`, `max_steps` and `max_seconds` comes first, and the
    learning rate falls towards that end; with `max_seconds` it depends on the clock. The values of
    the optimiser are the released recipe's, but for the rate itself, which depends on the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float = Field(default=1e-3, gt=0)
    floor: float = Field(default=0.1, ge=0, le=1, description="last rate as a share of lr")
    warmup: float = Field(default=0.03, ge=0, lt=1, description="share of the training")
    betas: Annotated[tuple[float, float], _WORDS] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    max_seconds: float | None = Field(default=None, gt=0)
    batch_groups: int = Field(default=32, ge=1)
    micro_tokens: int = Field(default=16384, ge=1, description="ids run at once, padding included")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    layout: Literal["shared", "flex", "separate"] = "shared"
    checkpointing: bool = Field(default=False, description="run layers again in the backward pass")
    strategy: Literal["ddp", "fsdp"] = Field(default="ddp", description="of several processes")
    tensorboard: bool = Field(default=False, description="also write event files")
    lora: LoraSettings | None = None
    seed: int = Field(default=0, ge=0)
    max_length: int | None = None
    max_response_length: int | None = None
    log_every: int = Field(default=10, ge=1)
    save_seconds: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _fit_together(self) -> TrainSettings:
        if (self.max_length is None) != (self.max_response_length is None):
            msg = "give max_length and max_response_length together, or neither"
            raise ValueError(msg)
        if self.lora and self.strategy == "fsdp":
            msg = "lora goes with strategy ddp, not fsdp: adapters are merged where they lie whole"
            raise ValueError(msg)
        return self


def read_settings(
    config: Path | None,
    words: Sequence[str] = (),
    recipe: str | None = None,
    base: Mapping[str, Any] | None = None,
) -> TrainSettings:
    """Settings from `base`, then a recipe, a YAML mapping, and words like `lr=3e-4`.

    What comes later wins. A dot reaches into a part: `lora.rank=8`.

    Raises:
        TrainerError: the file cannot be read, a name is unknown or a value does not fit; one line
            a fault, unknown names with the nearest valid one.
    """
    values = dict(base or {})
    values |= read_object(recipe_file(recipe), _ADVICE, TrainerError) if recipe else {}
    values |= read_object(config, _ADVICE, TrainerError) if config else {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign:
            msg = f"{word!r}: a setting is written name=value, for example lr=3e-4"
            raise TrainerError(msg)
        *parts, last = name.strip().split(".")
        inside = values
        for part in parts:
            inside[part] = inside.get(part) if isinstance(inside.get(part), dict) else {}
            inside = inside[part]
        inside[last] = None if value in ("", "null", "none") else value
    try:
        return TrainSettings.model_validate(values)
    except ValidationError as error:
        where = str(config) if config else "settings"
        raise TrainerError("\n".join(_fault(f, where) for f in error.errors())) from error


def _fault(fault: Any, where: str) -> str:
    name = ".".join(map(str, fault["loc"])) or "values"
    if fault["type"] != "extra_forbidden":
        return f"{where}: {name}: {fault['msg']} (given: {fault['input']!r})"
    known = sorted(TrainSettings.model_fields)
    if name.startswith("lora."):
        known = sorted(f"lora.{field}" for field in LoraSettings.model_fields)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"{where}: unknown setting {name!r}; {hint}"
