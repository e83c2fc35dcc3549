"""What a run configuration may say: one strict section per stage, each defined beside its stage.

Where things lie is in `workspace.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipelines.dedup import DedupSettings
from pipelines.embedded import PreferenceSettings, PromptSettings
from pipelines.groups import GroupSettings
from pipelines.pairs import PairSettings
from pipelines.plan import PlanSettings
from pipelines.prompt_sources import PromptSources
from pipelines.prompts import SplitSettings
from pipelines.rollouts import RolloutSettings
from pipelines.settings import Settings, load_yaml
from trainer.evaluate import EvaluationSettings
from trainer.language_settings import LanguageModelSettings
from trainer.settings import TrainSettings


class LakeSettings(Settings):
    """Limits of a lake connection."""

    threads: int = Field(default=2, ge=1)
    memory_limit: str = "2GB"
    patience: float = Field(default=60.0, ge=0, description="seconds to wait for other writers")
    keep_days: float = Field(
        default=30.0, ge=0, description="how long maintenance keeps snapshots that nothing names"
    )


class BackboneSettings(Settings):
    """The decoder that reward models start from."""

    vocabulary: int = Field(default=2048, ge=300, description="tokens of its tokenizer")
    tokenizer_texts: int = Field(
        default=20_000, ge=1, description="texts the tokenizer is trained on"
    )
    max_documents: int = Field(default=200_000, ge=1)
    model: LanguageModelSettings = LanguageModelSettings()


class RunConfig(Settings):
    """One corpus and what is trained on it: `pool` (rollouts) or `recorded` (existing answers)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=63)
    pool: str | None = Field(default=None, description="pool file, relative to this one")
    engine: Literal["local", "vllm"] | None = Field(
        default=None, description="what answers for folders of weights, whatever the pool says"
    )
    recorded: bool = Field(default=False, description="read trajectories from --data")
    threads: int = Field(default=2, ge=1, description="torch threads of rollouts and training")
    lake: LakeSettings = LakeSettings()
    split: SplitSettings = SplitSettings()
    prompts: PromptSettings = PromptSettings()
    prompt_sources: PromptSources | None = Field(
        default=None, description="prompts from files, instead of those of the embedded world"
    )
    rollouts: RolloutSettings = RolloutSettings()
    plan: PlanSettings = PlanSettings()
    preferences: PreferenceSettings = PreferenceSettings()
    dedup: DedupSettings = DedupSettings()
    pairs: PairSettings = PairSettings()
    groups: GroupSettings = GroupSettings()
    backbone: BackboneSettings = BackboneSettings()
    pretrain: TrainSettings = TrainSettings()
    finetune: TrainSettings = TrainSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    scaling: str | None = Field(
        default=None, description="plan of the asset `scaling`, a file, relative to this one"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> RunConfig:
        if self.recorded == (self.pool is not None):
            msg = "say either `pool: FILE` (policies that answer) or `recorded: true` (--data)"
            raise ValueError(msg)
        return self

    @property
    def is_recorded(self) -> bool:
        """Whether trajectories are read instead of made."""
        return self.recorded


def load_config(path: Path) -> RunConfig:
    """Read a run configuration.

    Raises:
        ConfigError: unknown keys (the nearest valid one is named) or values that do not hold.
    """
    return load_yaml(path, RunConfig)
