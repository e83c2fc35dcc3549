"""Keeping the lake small and quick: an asset for the UI, and a step of the weekly refresh."""

from datetime import timedelta

import dagster as dg

from assets.workspace import Workspace
from pipelines.maintenance import maintain as maintain_lake


def maintain(workspace: Workspace) -> dict[str, int]:
    """Merge small files and let old snapshots go that nothing names; the account of it."""
    with workspace.lake() as lake:
        return maintain_lake(lake, keep=timedelta(days=workspace.config.lake.keep_days))


@dg.asset(
    group_name="corpus",
    pool="corpus",
    description="Merge small files of the lake, let snapshots go that no checkpoint, evaluation or "
    "group names, and remove files that nothing needs. Readers never notice.",
    kinds={"ducklake"},
)
def maintenance(workspace: dg.ResourceParam[Workspace]) -> dg.MaterializeResult:
    """Files and bytes before and after, and snapshots let go."""
    return dg.MaterializeResult(metadata=maintain(workspace))


ASSETS = [maintenance]
