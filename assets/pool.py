"""The pool side of the graph: weights trained here, policies, prompts."""

from typing import Any

import dagster as dg

from assets import plots
from assets.results import made, progress_of, table_link
from assets.stages import asset_kwargs
from assets.workspace import Workspace
from pipelines.lake import Change, Replace, Upsert
from pipelines.schemas import TRAJECTORIES


@dg.asset(
    **asset_kwargs("embedded_policies"),
    pool="training",
    description="Weights of the embedded pool, trained from scratch on texts that the project "
    "writes. A run that is there is not trained again.",
)
def embedded_policies(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """Train each run of the pool's `embedded` section into POLAR_HOME/policies."""
    from assets.embedded import train_pool

    losses = train_pool(workspace, progress_of(context, workspace))
    metadata: dict[str, Any] = {
        "runs": len(losses),
        "folder": dg.MetadataValue.path(str(workspace.policies_dir)),
    }
    if losses:
        metadata["loss"] = plots.bars("loss of each run (nats per token)", losses)
    return made(context, workspace, metadata)


@dg.asset(
    **asset_kwargs("policies"),
    pool="corpus",
    description="Who answers: fingerprints of weights and templates, with groups and sides. Each "
    "policy is a partition of `trajectories`.",
)
def policies(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """Register the pool's policies; one whose weights are missing is reported, not fatal."""
    table, unavailable = workspace.policies_now()
    with workspace.lake() as lake:
        snapshot = lake.publish(
            "polar", f"policies: {table.num_rows} of the pool", [Upsert("policies", table)]
        )
    names = table["name"].to_pylist()
    context.instance.add_dynamic_partitions("policies", names)
    for name, reason in unavailable.items():
        context.log.warning(f"policy {name!r} cannot answer: {reason}")
    groups: dict[str, int] = {}
    for group in table["policy_group"].to_pylist():
        groups[group] = groups.get(group, 0) + 1
    return made(
        context,
        workspace,
        {
            "dagster/row_count": table.num_rows,
            "held out": sum(side == "test" for side in table["split"].to_pylist()),
            "unavailable": dg.MetadataValue.json(unavailable),
            "groups": plots.bars("policies by group", groups),
            "snapshot": snapshot,
            **table_link("policies", "from pool_overview"),
        },
    )


@dg.asset(
    **asset_kwargs("prompts"),
    pool="corpus",
    description="What is asked: document prefixes for base policies, instructions for chat "
    "policies, with prompt groups and sides.",
)
def prompts(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """Write the embedded world's prompts."""
    from pipelines import embedded

    table = embedded.prompts(
        workspace.config.prompts, workspace.config.split, workspace.pool.source
    )
    source = workspace.pool.source
    with workspace.lake() as lake:
        before = lake.query("select prompt_id, text from prompts where source = ?", [source])
        asked = dict(zip(*(table[name].to_pylist() for name in ("prompt_id", "text")), strict=True))
        gone = [
            row["prompt_id"]
            for row in before.to_pylist()
            if asked.get(row["prompt_id"]) != row["text"]
        ]
        changes: list[Change] = [Replace("prompts", table, f"source = '{source}'")]
        if gone:  # what answers them is of no prompt any more; earlier snapshots keep it
            inside = ", ".join(f"'{key}'" for key in gone)
            answers = TRAJECTORIES.schema.empty_table()
            changes.append(Replace("trajectories", answers, f"prompt_id in ({inside})"))
        snapshot = lake.publish("polar", f"prompts: {table.num_rows:,}", changes)
    kinds: dict[str, int] = {}
    for kind, side in zip(table["kind"].to_pylist(), table["split"].to_pylist(), strict=True):
        kinds[f"{kind}, {side}"] = kinds.get(f"{kind}, {side}", 0) + 1
    return made(
        context,
        workspace,
        {
            "dagster/row_count": table.num_rows,
            "gone": len(gone),
            "kinds": plots.bars("prompts by kind and side", kinds),
            "snapshot": snapshot,
            **table_link("prompts"),
        },
    )


ASSETS = [embedded_policies, policies, prompts]
