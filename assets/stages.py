"""The stages of a run: which assets there are, and what they depend on.

When one is stale is in staleness.py; what a stage does is in pool.py, corpus.py, training.py,
evaluation.py and scaling.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq

from assets.workspace import Workspace
from pipelines.attach import CATALOG
from pipelines.errors import ConfigError
from pipelines.prompt_sources import stamp

POLICY_PARTITIONS = dg.DynamicPartitionsDefinition(name="policies")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run; `outputs` are its asset names when it makes more than its own."""

    name: str
    group: str
    upstream: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    settings: Callable[[Workspace], Any] = lambda _: None
    files: Callable[[Workspace], list[Path]] = lambda w: [w.home / CATALOG]
    outputs: tuple[str, ...] = ()
    partitioned: bool = False
    on_demand: bool = False  # made only when it is asked for by name
    idle: Callable[[Workspace], str | None] = lambda _: None  # why there is nothing to do

    @property
    def of_sources(self) -> bool:
        """Whether its rows in the lake are of the sources, which configurations may share."""
        return self.group in ("pool", "corpus")

    @property
    def assets(self) -> tuple[str, ...]:
        """The asset names that this stage materialises."""
        return self.outputs or (self.name,)


def _section(name: str) -> Callable[[Workspace], Any]:
    return lambda w: getattr(w.config, name)


def _prompt_settings(workspace: Workspace) -> dict[str, Any]:
    config = workspace.config
    if config.prompt_sources is None:
        return {"settings": [config.prompts, config.split, workspace.embedded]}
    files = stamp(config.prompt_sources, workspace.config_path.parent)
    return {"files": files, "settings": [config.prompt_sources, config.split]}


def _no_preferences(workspace: Workspace) -> str | None:
    path = workspace.groups_file("sft", "train")
    if path.exists() and pq.ParquetFile(path).metadata.num_rows == 0:
        return "no preferences with a reference to fine-tune on"
    return None


def _checkpoint(name: str) -> Callable[[Workspace], list[Path]]:
    return lambda w: [w.checkpoint(name) / "config.json"]


_POOL = (
    Stage(
        name="embedded_policies",
        group="pool",
        code=("pipelines.embedded", "trainer.language_model"),
        settings=lambda w: w.embedded,
        files=lambda w: [w.policies_dir / r.name for r in w.embedded.runs] if w.embedded else [],
    ),
    Stage(
        name="policies",
        group="pool",
        upstream=("embedded_policies",),
        code=("pipelines.policies",),
        settings=lambda w: {
            "weights": [w.policies_now()[0]["revision"].to_pylist(), w.policies_now()[1]],
            "settings": [
                w.pool.source,
                # how a policy is asked is no part of what it is
                [policy.model_dump(exclude={"vllm", "openai"}) for policy in w.pool.policies],
                w.config.split,
            ],
        },
    ),
    Stage(
        name="prompts",
        group="pool",
        code=("pipelines.embedded", "pipelines.prompt_sources"),
        settings=lambda w: _prompt_settings(w),
    ),
    Stage(
        name="trajectories",
        group="corpus",
        upstream=("policies", "prompts"),
        code=("pipelines.rollouts", "pipelines.engines.local"),
        settings=_section("rollouts"),
        partitioned=True,
    ),
    Stage(
        name="preferences",
        group="corpus",
        upstream=("trajectories", "prompts"),
        code=("pipelines.embedded",),
        settings=_section("preferences"),
    ),
)

_RECORDED = (
    Stage(
        name="recorded",
        group="corpus",
        code=("pipelines.engines.recorded",),
        settings=lambda w: {"data": recorded_fingerprint(w), "settings": w.config.split},
        files=lambda w: [w.home / CATALOG, w.sources_file],
        outputs=("policies", "prompts", "trajectories", "preferences"),
    ),
)

_COMMON = (
    Stage(
        name="duplicates",
        group="corpus",
        upstream=("trajectories",),
        code=("pipelines.dedup",),
        settings=_section("dedup"),
        files=lambda w: [w.home / CATALOG, w.signatures],
    ),
    Stage(
        name="pairs",
        group="corpus",
        upstream=("duplicates", "policies", "prompts"),
        code=("pipelines.pairs",),
        settings=_section("pairs"),
    ),
    Stage(
        name="groups",
        group="corpus",
        upstream=("pairs", "preferences"),
        code=("pipelines.groups",),
        settings=lambda w: [w.config.groups, w.config.pairs],
        files=lambda w: [
            w.groups_file(wrapper, split)
            for wrapper in ("pretrain", "sft")
            for split in ("train", "eval")
        ],
    ),
    Stage(
        name="backbone",
        group="training",
        upstream=("groups",),
        code=("trainer.language_model",),
        settings=_section("backbone"),
        files=_checkpoint("backbone"),
    ),
    Stage(
        name="pretrained",
        group="training",
        upstream=("backbone", "groups"),
        code=("trainer.loop",),
        settings=_section("pretrain"),
        files=_checkpoint("pretrained"),
    ),
    Stage(
        name="finetuned",
        group="training",
        upstream=("pretrained", "groups"),
        code=("trainer.loop",),
        settings=_section("finetune"),
        files=_checkpoint("finetuned"),
        idle=_no_preferences,
    ),
    Stage(
        name="finetuned_alone",
        group="training",
        upstream=("backbone", "groups"),
        code=("trainer.loop",),
        settings=_section("finetune"),
        files=_checkpoint("finetuned_alone"),
        idle=_no_preferences,
    ),
    Stage(
        name="report",
        group="evaluation",
        upstream=("pretrained", "finetuned", "finetuned_alone", "groups"),
        code=("trainer.evaluate", "trainer.report"),
        settings=_section("evaluation"),
        files=lambda w: [w.report_dir / "report.html"],
    ),
    Stage(
        name="scaling",
        group="evaluation",
        upstream=("groups",),
        code=("trainer.scaling_runs", "trainer.scaling_report"),
        settings=lambda w: w.scaling,
        files=lambda w: [w.scaling_dir / "report.html"],
        on_demand=True,
    ),
)


@cache
def stages(*, recorded: bool) -> dict[str, Stage]:
    """All stages in an order in which each comes after what it depends on."""
    return {stage.name: stage for stage in (_RECORDED if recorded else _POOL) + _COMMON}


def stages_of(workspace: Workspace) -> dict[str, Stage]:
    """The stages of a workspace's configuration."""
    return stages(recorded=workspace.config.is_recorded)


def stage_making(workspace: Workspace, asset: str) -> Stage:
    """The stage that makes an asset.

    Raises:
        ConfigError: there is no such asset; the nearest one is named.
    """
    makers = {name: stage for stage in stages_of(workspace).values() for name in stage.assets}
    if asset not in makers:
        near = difflib.get_close_matches(asset, makers, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(makers)}"
        msg = f"{workspace.config.name} has no asset {asset!r}; {hint}"
        raise ConfigError(msg)
    return makers[asset]


def asset_kwargs(name: str, *, recorded: bool = False) -> dict[str, Any]:
    """What `@dg.asset` needs to know of a stage: its group and what it depends on."""
    stage = stages(recorded=recorded)[name]
    known: dict[str, Any] = {
        "group_name": stage.group,
        "deps": [dg.AssetKey(upstream) for upstream in stage.upstream],
    }
    return known | ({"partitions_def": POLICY_PARTITIONS} if stage.partitioned else {})


def ancestors(workspace: Workspace, until: str | None) -> list[Stage]:
    """The stages needed for the asset `until`, in order; when it is None, all of a whole run."""
    every = stages_of(workspace)
    if until is None:
        return [stage for stage in every.values() if not stage.on_demand]
    wanted: set[str] = set()
    last = stage_making(workspace, until)
    if last.on_demand:
        last.settings(workspace)  # refused now if they do not hold, not after all that comes before
    queue = [last]
    while queue:
        stage = queue.pop()
        if stage.name not in wanted:
            wanted.add(stage.name)
            queue += [stage_making(workspace, name) for name in stage.upstream]
    return [stage for stage in every.values() if stage.name in wanted]


@cache
def recorded_digest(data: Path, stamp: tuple[Any, ...]) -> str:
    """Content digest of recorded data; `stamp` (sizes and times) keys the cache."""
    from pipelines.engines.recorded import fingerprint

    return fingerprint(data)


def recorded_fingerprint(workspace: Workspace) -> str:
    """What the recorded data says, whatever folder it is in."""
    data = workspace.recorded_data()
    files = sorted(data.iterdir()) if data.is_dir() else [data]
    stamp = tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())
    return recorded_digest(data, stamp)
