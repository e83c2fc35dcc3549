"""When a stage is stale, and what it was made with.

A stage is stale when its code, its settings or a stage upstream differ from what its last
materialisation for this configuration was made with, when its files are gone, when one of its
blocking checks failed, or when another configuration of the same source has made the rows anew with
something else. Which stages there are is in stages.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
from dagster import EventLogRecord
from dagster._core.storage.asset_check_execution_record import (
    COMPLETED_ASSET_CHECK_EXECUTION_RECORD_STATUSES,
    AssetCheckExecutionRecordStatus,
)

from assets.digests import code_digest, digest
from assets.stages import Stage, stage_making
from assets.workspace import Workspace

CONFIG_TAG = "polar/config"
SOURCES = "sources"
"""Metadata: whose rows were made; configurations of one source replace each other's."""
UNMADE = "answers removed in snapshot"
"""Metadata of prompts: when answers last went with their prompts. It is part of the fingerprint,
so that prompts that come back are answered again."""
PROVENANCE = "provenance"
ROWS = "dagster/row_count"
OWED = "not answered by a failing server"
"""Metadata of a policy's answers: how many are wanted and were not given."""
AMONG = "asked beside"
"""Metadata of a policy's answers: ids of the pool's policies, where prompts are dealt out among
them. When one of them goes, its prompts fall to others."""


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
        record = last_made(workspace, instance, stage)
        made = _provenance_of(record)
        unmade = unmade_of(record)
        return digest([made, unmade] if unmade else made) if made else ""
    parts = {
        name: last_made(workspace, instance, stage, name)
        for name in sorted(workspace_policy_ids(workspace))
    }
    return digest(
        {
            name: [_provenance_of(record), _metadata(record, ROWS, 0)]
            for name, record in parts.items()
            if record
        }
    )


def last_made(
    workspace: Workspace, instance: dg.DagsterInstance, stage: Stage, partition: str | None = None
) -> EventLogRecord | None:
    """The last materialisation for this configuration."""
    return _own(workspace, _newest(instance, stage, partition))


def last_of_sources(
    workspace: Workspace, instance: dg.DagsterInstance, stage: Stage, partition: str | None = None
) -> EventLogRecord | None:
    """The last materialisation of rows of this configuration's sources, whichever made it."""
    return _of_sources(workspace, stage, _newest(instance, stage, partition))


def maker_of(record: EventLogRecord | None) -> str | None:
    """The name of the configuration that a materialisation was for."""
    event = record.asset_materialization if record else None
    return (event.tags or {}).get(CONFIG_TAG) if event else None


def unmade_of(record: EventLogRecord | None) -> int | None:
    """The snapshot in which answers last went with their prompts, as the record says."""
    return _metadata(record, UNMADE, None)


def _newest(
    instance: dg.DagsterInstance, stage: Stage, partition: str | None
) -> Sequence[EventLogRecord]:
    return instance.fetch_materializations(
        dg.AssetRecordsFilter(
            asset_key=dg.AssetKey(stage.assets[0]),
            asset_partitions=[partition] if partition is not None else None,
        ),
        limit=100,
    ).records


def _own(workspace: Workspace, records: Sequence[EventLogRecord]) -> EventLogRecord | None:
    return next((r for r in records if maker_of(r) == workspace.config.name), None)


def _of_sources(
    workspace: Workspace, stage: Stage, records: Sequence[EventLogRecord]
) -> EventLogRecord | None:
    sources = set(workspace.sources) if stage.of_sources else set()
    for record in records:
        if maker_of(record) == workspace.config.name:
            return record
        if sources & set(_metadata(record, SOURCES, [])):
            return record
    return None


def _metadata(record: EventLogRecord | None, name: str, default: Any) -> Any:
    event = record.asset_materialization if record else None
    value = event.metadata.get(name) if event else None
    return value.value if value is not None else default


def last_provenance(
    workspace: Workspace, instance: dg.DagsterInstance, stage: Stage, partition: str | None = None
) -> dict[str, Any] | None:
    """What the last materialisation for this configuration was made with, if there is one."""
    return _provenance_of(last_made(workspace, instance, stage, partition))


def _provenance_of(record: EventLogRecord | None) -> dict[str, Any] | None:
    value = _metadata(record, PROVENANCE, None)
    return dict(value) if value is not None else None


def why_stale(
    workspace: Workspace, instance: dg.DagsterInstance, stage: Stage, partition: str | None = None
) -> str | None:
    """Why a stage (or one partition of it) has to be made; None when it is current or idle."""
    if stage.idle(workspace):
        return None
    records = _newest(instance, stage, partition)
    own = _own(workspace, records)
    made = _provenance_of(own)
    if made is None:
        return "never made"
    now = provenance(workspace, instance, stage, partition)
    changed = [name for name in now if now[name] != made.get(name)]
    if changed:
        return "changed: " + ", ".join(changed)
    latest = _of_sources(workspace, stage, records)
    if _provenance_of(latest) != made:
        return f"replaced by the configuration {maker_of(latest)!r}"
    if unasked := _unasked(workspace, own):
        return unasked
    gone = [path for path in stage.files(workspace) if not path.exists()]
    if gone:
        return f"missing: {gone[0].relative_to(workspace.home)}"
    failed = failed_checks(workspace, instance, stage, partition)
    return f"check failed: {', '.join(failed)}" if failed else None


def _unasked(workspace: Workspace, record: EventLogRecord | None) -> str | None:
    """Why a policy is asked again though it and its prompts are as they were."""
    owed = _metadata(record, OWED, 0)
    if owed:
        return f"{owed:,} {OWED}"
    left = set(_metadata(record, AMONG, [])) - set(workspace_policy_ids(workspace).values())
    return "prompts of policies that left the pool" if left else None


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
