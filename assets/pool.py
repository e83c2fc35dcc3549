"""The pool side of the graph: weights trained here, policies, prompts."""

from collections import Counter
from typing import Any

import dagster as dg
import pyarrow as pa

from assets import plots
from assets.progress import Progress
from assets.results import (
    AUTHOR,
    count_plot,
    made,
    progress_of,
    reading,
    replace_counts,
    table_link,
)
from assets.stages import asset_kwargs, stage_making
from assets.staleness import UNMADE, last_of_sources, maker_of, unmade_of
from assets.workspace import Workspace
from pipelines import ids
from pipelines.attach import quoted
from pipelines.errors import ConfigError
from pipelines.labels import sql_list
from pipelines.lake import Change, Replace, Upsert
from pipelines.policies import moved
from pipelines.prompt_sources import Drawn, draw_prompts, label_prefix
from pipelines.schemas import COUNTS, QUARANTINE, TRAJECTORIES


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
        earlier = lake.query("from policies where source = ?", [workspace.pool.source])
        rows = pa.concat_tables([table, moved(earlier, table)])
        snapshot = lake.publish(
            AUTHOR, f"policies: {table.num_rows} of the pool", [Upsert("policies", rows)]
        )
    names = table["name"].to_pylist()
    context.instance.add_dynamic_partitions("policies", names)
    for name, reason in unavailable.items():
        context.log.warning(f"policy {name!r} cannot answer: {reason}")
    return made(
        context,
        workspace,
        {
            "dagster/row_count": table.num_rows,
            "held out": sum(side == "test" for side in table["split"].to_pylist()),
            "unavailable": dg.MetadataValue.json(unavailable),
            "groups": plots.bars("policies by group", Counter(table["policy_group"].to_pylist())),
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
    """Draw prompts from files, or write those of the embedded world.

    Raises:
        ConfigError: answers that another configuration made would go with their prompts.
    """
    source = workspace.pool.source
    read = reading(context, workspace, "prompts")
    latest = last_of_sources(workspace, context.instance, stage_making(workspace, "prompts"))
    with workspace.lake() as lake:
        before = lake.query(
            "select prompt_id, text, prompt_group from prompts where source = ?", [source]
        )
        drawn = _drawn(workspace, before, progress_of(context, workspace))
        table = drawn.prompts
        asked = dict(zip(*(table[name].to_pylist() for name in ("prompt_id", "text")), strict=True))
        gone = [
            row["prompt_id"]
            for row in before.to_pylist()
            if asked.get(row["prompt_id"]) != row["text"]
        ]
        changes: list[Change] = [
            Replace("prompts", table, f"source = {quoted(source)}"),
            Replace("quarantine", drawn.quarantine, _listed(source)),
            replace_counts(drawn.counts, "ingest", [source]),
        ]
        theirs = f"prompt_id in ({sql_list([str(key) for key in gone])})" if gone else "false"
        counted = lake.query(f"select count(*) as n from trajectories where {theirs}")
        answers = counted["n"][0].as_py()
        if answers:  # they are of no prompt any more; earlier snapshots keep them
            _refuse_to_remove(answers, workspace, maker_of(latest))
            none = TRAJECTORIES.schema.empty_table()
            changes.append(Replace("trajectories", none, theirs))
        snapshot = lake.publish(AUTHOR, f"prompts: {table.num_rows:,}", changes)
    unmade = snapshot if answers else unmade_of(latest)
    kinds = Counter(
        f"{row['kind']}, {row['split']}" for row in table.select(["kind", "split"]).to_pylist()
    )
    return made(
        context,
        workspace,
        {
            "dagster/row_count": table.num_rows,
            "gone": len(gone),
            "answers removed": answers,
            **({UNMADE: unmade} if unmade is not None else {}),
            "kept out": count_plot("rows kept out, by reason", drawn.counts),
            "kinds": plots.bars("prompts by kind and side", kinds),
            "snapshot": snapshot,
            **table_link("prompts"),
        },
        read=read,
    )


def _refuse_to_remove(answers: int, workspace: Workspace, other: str | None) -> None:
    if other not in (None, workspace.config.name):
        msg = (
            f"{workspace.config_path} asks the pool {workspace.pool.source!r} other prompts than "
            f"the configuration {other!r} did, whose {answers:,} answers would be removed: use "
            f"another POLAR_HOME, or add these prompts to {other!r}"
        )
        raise ConfigError(msg)


def _drawn(workspace: Workspace, before: pa.Table, progress: Progress) -> Drawn:
    """The prompts of the configuration, their account and what was kept out."""
    from pipelines import embedded

    config, source = workspace.config, workspace.pool.source
    if config.prompt_sources is None:
        if workspace.embedded is None:
            msg = (
                f"{workspace.config_path}: the pool {source!r} has no prompts; say where they come "
                "from in `prompt_sources` (docs/prompts.md)"
            )
            raise ConfigError(msg)
        return Drawn(
            prompts=embedded.prompts(config.prompts, config.split, source),
            counts=COUNTS.schema.empty_table(),
            quarantine=QUARANTINE.schema.empty_table(),
        )
    keys, groups = ids.storage(before["prompt_id"]), before["prompt_group"]
    return draw_prompts(
        config.prompt_sources,
        source,
        config.split,
        workspace.places,
        dict(zip(keys.to_pylist(), groups.to_pylist(), strict=True)),
        progress,
    )


def _listed(source: str) -> str:
    return f"starts_with(file, {quoted(label_prefix(source))})"


ASSETS = [embedded_policies, policies, prompts]
