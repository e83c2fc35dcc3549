"""What an asset hands back to Dagster: its numbers, its plot, and what it was made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg
import pyarrow as pa

from assets import plots
from assets.digests import digest
from assets.progress import Progress, log_progress
from assets.stages import stage_making
from assets.staleness import CONFIG_TAG, PROVENANCE, SOURCES, provenance
from assets.workspace import Workspace
from pipelines.labels import sql_list
from pipelines.lake import Replace

AUTHOR = "polar"
"""Who publishes, in the lake's snapshots."""


def progress_of(context: dg.AssetExecutionContext, workspace: Workspace) -> Progress:
    """Where an asset's progress goes: the terminal that runs it, else Dagster's log."""
    return workspace.listener or log_progress(context.log)


def reading(context: dg.AssetExecutionContext, workspace: Workspace, asset: str) -> dict[str, Any]:
    """The provenance of an asset that begins to read now.

    One whose input may change while it is read hands it to `made`, to be stale then.
    """
    partition = context.partition_key if context.has_partition_key else None
    return provenance(workspace, context.instance, stage_making(workspace, asset), partition)


def made(
    context: dg.AssetExecutionContext,
    workspace: Workspace,
    metadata: Mapping[str, Any],
    *,
    asset: str | None = None,
    read: dict[str, Any] | None = None,
) -> dg.MaterializeResult:
    """The result of an asset, with the provenance that says later whether it is stale.

    `read` is what was there when it began, where that matters (`reading`).
    """
    key = asset or context.asset_key.to_user_string()
    stage = stage_making(workspace, key)
    now = read or reading(context, workspace, key)
    told: dict[str, Any] = {**metadata, PROVENANCE: dg.MetadataValue.json(now)}
    if stage.of_sources:
        told[SOURCES] = dg.MetadataValue.json(workspace.sources)
    return dg.MaterializeResult(
        asset_key=key,
        metadata=told,
        data_version=dg.DataVersion(digest(now)),
        tags={CONFIG_TAG: workspace.config.name},
    )


def table_link(table: str, query: str | None = None) -> dict[str, Any]:
    """Metadata that says how to look at a table."""
    return {"table": dg.MetadataValue.md(f'`polar sql "{query or f"from {table} limit 20"}"`')}


def of_sources(sources: list[str], prompt_column: str = "prompt_id") -> str:
    """SQL predicate: rows whose prompt is of these sources."""
    return (
        f"{prompt_column} in (select prompt_id from prompts where source in ({sql_list(sources)}))"
    )


def of_sources_or_gone(sources: list[str]) -> str:
    """SQL predicate: rows whose prompt is of these sources, or is there no more."""
    return f"{of_sources(sources)} or prompt_id not in (select prompt_id from prompts)"


def replace_counts(counts: pa.Table, stage: str, sources: list[str]) -> Replace:
    """The change that sets a stage's counts for some sources."""
    return Replace(
        "counts", counts, f"stage = '{stage}' and source in ({sql_list([*sources, 'all'])})"
    )


def count_plot(title: str, counts: pa.Table, by: str = "reason") -> dg.MarkdownMetadataValue:
    """Rows out and rows kept out, by reason, as bars."""
    totals: dict[str, int] = {}
    for row in counts.to_pylist():
        if row["what"] == "in":
            continue
        name = row["label"] or row["what"] if row["what"] == "out" else row[by] or row["what"]
        totals[name] = totals.get(name, 0) + row["rows"]
    return plots.bars(title, totals)
