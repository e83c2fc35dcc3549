"""The stages of a run: which assets there are, what they depend on, and when one is stale.

A stage is stale when its code, its settings or a stage upstream differ from what its last
materialisation for this configuration was made with, when its files are gone, or when one of its
blocking checks failed. What a stage does is in pool.py, corpus.py, training.py, evaluation.py and
scaling.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
from dagster import EventLogRecord
from dagster._core.storage.asset_check_execution_record import (
    COMPLETED_ASSET_CHECK_EXECUTION_RECORD_STATUSES,
    AssetCheckExecutionRecordStatus,
)

from assets.digests import code_digest, digest
from assets.workspace import Workspace
from pipelines.attach import CATALOG
from pipelines.errors import ConfigError
from pipelines.prompt_sources import stamp

CONFIG_TAG = "polar/config"
PROVENANCE = "provenance"
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
        files=lambda w: [w.home / CATALOG, w.signatures_file],
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


# --- what a stage was made with ---------------------------------------------------------------


def provenance(
    workspace: Workspace, instance: dg.DagsterInstance, stage: Stage, partition: str | None = None
) -> dict[str, Any]:
    """Digests of a stage's code and settings, and the fingerprints of what it reads."""
    settings = stage.settings(workspace)
    named = settings if isinstance(settings, dict) else {"settings": settings}
    made: dict[str, Any] = {"code": code_digest(stage.code)}
    made |= {name: digest(value) for name, value in named.items()}
    for name in stage.upstream:
        made[name] = fingerprint_of(workspace, instance, stage_making(workspace, name))
    if partition is not None:  # another policy joining the pool must not unmake this one's answers
        made["policies"] = workspace_policy_ids(workspace).get(partition, "not registered")
    return made


def fingerprint_of(workspace: Workspace, instance: dg.DagsterInstance, stage: Stage) -> str:
    """The fingerprint of a stage's last materialisation, over all partitions; '' for none."""
    if not stage.partitioned:
        made = last_provenance(workspace, instance, stage)
        return digest(made) if made else ""
    parts = {
        name: last_provenance(workspace, instance, stage, name)
        for name in sorted(workspace_policy_ids(workspace))
    }
    return digest({name: made for name, made in parts.items() if made})


def last_made(
    workspace: Workspace, instance: dg.DagsterInstance, stage: Stage, partition: str | None = None
) -> EventLogRecord | None:
    """The last materialisation for this configuration."""
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(
            asset_key=dg.AssetKey(stage.assets[0]),
            asset_partitions=[partition] if partition is not None else None,
        ),
        limit=100,
    ).records
    for record in records:
        event = record.asset_materialization
        if event is not None and (event.tags or {}).get(CONFIG_TAG) == workspace.config.name:
            return record
    return None


def last_provenance(
    workspace: Workspace, instance: dg.DagsterInstance, stage: Stage, partition: str | None = None
) -> dict[str, Any] | None:
    """What the last materialisation for this configuration was made with, if there is one."""
    record = last_made(workspace, instance, stage, partition)
    event = record.asset_materialization if record else None
    value = event.metadata.get(PROVENANCE) if event else None
    return dict(value.value) if value is not None else None  # type: ignore[arg-type]


def why_stale(
    workspace: Workspace, instance: dg.DagsterInstance, stage: Stage, partition: str | None = None
) -> str | None:
    """Why a stage (or one partition of it) has to be made; None when it is current or idle."""
    if stage.idle(workspace):
        return None
    made = last_provenance(workspace, instance, stage, partition)
    if made is None:
        return "never made"
    now = provenance(workspace, instance, stage, partition)
    changed = [name for name in now if now[name] != made.get(name)]
    if changed:
        return "changed: " + ", ".join(changed)
    gone = [path for path in stage.files(workspace) if not path.exists()]
    if gone:
        return f"missing: {gone[0].relative_to(workspace.home)}"
    failed = failed_checks(workspace, instance, stage, partition)
    return f"check failed: {', '.join(failed)}" if failed else None


def failed_checks(
    workspace: Workspace, instance: dg.DagsterInstance, stage: Stage, partition: str | None = None
) -> list[str]:
    """Names of checks that did not pass, or did not run, after the stage was last made."""
    from assets.checks import check_keys

    made = last_made(workspace, instance, stage, partition)
    return sorted(
        key.name
        for key in check_keys()
        if made is not None
        and key.asset_key.to_user_string() in stage.assets
        and not _passed(workspace, instance, key, made)
    )


def _passed(
    workspace: Workspace, instance: dg.DagsterInstance, key: dg.AssetCheckKey, made: EventLogRecord
) -> bool:
    """Whether the check's last execution for this configuration saw `made`, and passed."""
    records = instance.event_log_storage.get_asset_check_execution_history(
        key, limit=100, status=COMPLETED_ASSET_CHECK_EXECUTION_RECORD_STATUSES
    )
    for record in records:
        config = record.evaluation.metadata.get(CONFIG_TAG) if record.evaluation else None
        if record.event is not None and config and config.value == workspace.config.name:
            seen = record.run_id == made.run_id or record.event.timestamp >= made.timestamp
            return seen and record.status == AssetCheckExecutionRecordStatus.SUCCEEDED
    return False


def workspace_policy_ids(workspace: Workspace) -> Mapping[str, str]:
    """Ids by name of the pool's policies that are registered with the weights they have now."""
    lake = workspace.reader() if workspace.config.pool is not None else None
    if lake is None:
        return {}
    known = workspace.policies_now()[0].select(["name", "policy_id"]).to_pylist()
    registered = lake.query("select policy_id from policies")["policy_id"].to_pylist()
    return {p["name"]: str(p["policy_id"]) for p in known if p["policy_id"] in set(registered)}


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
