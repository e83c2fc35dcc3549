"""The stages of a run: which assets there are, what they depend on, and when one is stale.

A stage is stale when its code, its settings or a stage upstream differ from what its last
materialisation for this configuration was made with, when its files are gone, or when one of its
blocking checks failed. What a stage does is in pool.py, corpus.py, training.py and evaluation.py.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

from assets.workspace import Workspace
from pipelines.attach import CATALOG

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
    idle: Callable[[Workspace], str | None] = lambda _: None  # why there is nothing to do

    @property
    def assets(self) -> tuple[str, ...]:
        """The asset names that this stage materialises."""
        return self.outputs or (self.name,)


def _section(name: str) -> Callable[[Workspace], Any]:
    return lambda w: getattr(w.config, name)


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
        files=lambda w: [w.policies_dir],
    ),
    Stage(
        name="policies",
        group="pool",
        upstream=("embedded_policies",),
        code=("pipelines.policies",),
        settings=lambda w: [w.pool.source, w.pool.policies, w.config.split],
    ),
    Stage(
        name="prompts",
        group="pool",
        code=("pipelines.embedded",),
        settings=lambda w: [w.config.prompts, w.config.split, w.embedded],
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
        settings=lambda w: [recorded_fingerprint(w), w.config.split],
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
)


@cache
def stages(*, recorded: bool) -> dict[str, Stage]:
    """All stages in an order in which each comes after what it depends on."""
    return {stage.name: stage for stage in (_RECORDED if recorded else _POOL) + _COMMON}


def stages_of(workspace: Workspace) -> dict[str, Stage]:
    """The stages of a workspace's configuration."""
    return stages(recorded=workspace.config.is_recorded)


def stage_making(workspace: Workspace, asset: str) -> Stage:
    """The stage that makes an asset."""
    return next(s for s in stages_of(workspace).values() if asset in s.assets)


def asset_kwargs(name: str, *, recorded: bool = False) -> dict[str, Any]:
    """What `@dg.asset` needs to know of a stage: its group and what it depends on."""
    stage = stages(recorded=recorded)[name]
    known: dict[str, Any] = {
        "group_name": stage.group,
        "deps": [dg.AssetKey(upstream) for upstream in stage.upstream],
    }
    return known | ({"partitions_def": POLICY_PARTITIONS} if stage.partitioned else {})


def ancestors(workspace: Workspace, until: str | None) -> list[Stage]:
    """The stages needed for the asset `until`, in order; all of them when it is None."""
    every = stages_of(workspace)
    if until is None:
        return list(every.values())
    wanted: set[str] = set()
    queue = [stage_making(workspace, until)]
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
    made: dict[str, Any] = {
        "code": _code_digest(stage.code),
        "settings": digest(_plain(stage.settings(workspace))),
    }
    for name in stage.upstream:
        made[name] = fingerprint_of(workspace, instance, stage_making(workspace, name))
    if partition is not None:  # another policy joining the pool must not unmake this one's answers
        made["policies"] = workspace_policy_ids(workspace).get(partition, "not registered")
    return made


def digest(value: Any) -> str:
    """A short digest of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


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


def last_provenance(
    workspace: Workspace, instance: dg.DagsterInstance, stage: Stage, partition: str | None = None
) -> dict[str, Any] | None:
    """What the last materialisation for this configuration was made with, if there is one."""
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
            value = event.metadata.get(PROVENANCE)
            return dict(value.value) if value is not None else None  # type: ignore[arg-type]
    return None


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
        return f"missing: {gone[0].name}"
    failed = failed_checks(instance, stage)
    return f"check failed: {', '.join(failed)}" if failed else None


def failed_checks(instance: dg.DagsterInstance, stage: Stage) -> list[str]:
    """Names of the stage's checks whose last execution failed."""
    from assets.checks import check_keys

    keys = [key for key in check_keys() if key.asset_key.to_user_string() in stage.assets]
    if not keys:
        return []
    last = instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
    return [
        key.name
        for key, record in last.items()
        if record.status == AssetCheckExecutionRecordStatus.FAILED
    ]


def workspace_policy_ids(workspace: Workspace) -> Mapping[str, str]:
    """Policy ids by name of the pool's policies that are registered in the lake."""
    lake = workspace.reader() if workspace.config.pool is not None else None
    if lake is None:
        return {}
    rows = lake.query(
        "select name, policy_id::varchar as id from policies where source = ?",
        [workspace.pool.source],
    ).to_pylist()
    named = {policy.name for policy in workspace.pool.policies}
    return {row["name"]: row["id"] for row in rows if row["name"] in named}


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


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@cache
def _code_digest(modules: tuple[str, ...]) -> str:
    """A digest of modules and of all that they import of the project; comments change nothing."""
    trees: dict[str, str] = {}
    queue = list(modules)
    while queue:
        name = queue.pop()
        spec = importlib.util.find_spec(name)
        if name in trees or name in _SHARED or spec is None or spec.origin is None:
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        trees[name] = _without_docstrings(tree)
        queue += [found for found in _imports(tree) if found.split(".")[0] in _FLOORS]
    return digest(trees)


_FLOORS = ("pipelines", "trainer")
_SHARED = ("pipelines.schemas", "pipelines.settings", "pipelines.errors", "trainer.errors")


def _imports(tree: ast.Module) -> Iterator[str]:
    """Names of modules that a module imports, at whatever depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if node.module.split(".")[0] in _FLOORS and _is_module(name):
                    yield name


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


def _without_docstrings(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            first.value.value = ""
    return ast.dump(tree)
