"""What changed since an earlier snapshot, as the metadata of an asset or a refresh.

The comparison itself is `pipelines/difference.py`; `polar diff` prints it in a terminal.
"""

from __future__ import annotations

from typing import Any

import dagster as dg

from assets import plots
from assets.stages import stage_making
from assets.staleness import last_made
from assets.workspace import Workspace
from pipelines.difference import difference
from pipelines.errors import LakeError
from pipelines.lake import Lake


def changes(lake: Lake, before: int | None, after: int) -> dict[str, Any]:
    """Rows, policies, balance and duplicates that differ, each as a table."""
    if before is None:
        return {"changed": "all of it is new"}
    try:
        facts = difference(lake, before, after)
    except LakeError as error:
        return {"changed": str(error)}
    told = {
        f"changed: {name.replace('_', ' ')}": plots.table(rows)
        for name, rows in facts.items()
        if isinstance(rows, list) and rows
    }
    return {"changed since snapshot": before, **told}


def changes_of(
    context: dg.AssetExecutionContext, workspace: Workspace, lake: Lake, snapshot: int
) -> dict[str, Any]:
    """What changed in the lake since the asset was last made for this configuration."""
    stage = stage_making(workspace, context.asset_key.to_user_string())
    record = last_made(workspace, context.instance, stage)
    event = record.asset_materialization if record else None
    before = event.metadata.get("snapshot") if event else None
    return changes(lake, int(before.value) if before else None, snapshot)  # type: ignore[arg-type]
