"""The corpus side of the graph: recorded data, duplicates, pairs, preferences, groups.

Each asset reads the lake, calls one function of `pipelines`, and publishes in one transaction.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from assets import plots
from assets.changes import changes_of
from assets.results import (
    AUTHOR,
    count_plot,
    made,
    of_sources,
    of_sources_or_gone,
    progress_of,
    reading,
    replace_counts,
    table_link,
)
from assets.stages import asset_kwargs, stages
from assets.turns import alone, scratch
from assets.workspace import Workspace
from pipelines.attach import quoted
from pipelines.errors import ConfigError
from pipelines.labels import input_sql, sql_list
from pipelines.lake import Replace

MANY_ANSWERS = 200_000  # from here on several processes are worth their start


@dg.multi_asset(
    specs=[
        dg.AssetSpec(
            name,
            group_name="pool" if name in ("policies", "prompts") else "corpus",
            description=f"The {name} of the recorded data.",
            kinds={"ducklake"},
        )
        for name in stages(recorded=True)["recorded"].outputs
    ],
    name="recorded",
    description="Existing trajectories: read, checked, bad rows set aside, published at once.",
)
def recorded(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> Iterator[dg.MaterializeResult]:
    """Ingest a folder of recorded trajectories in one transaction."""
    from pipelines.engines.recorded import ingest

    data = workspace.recorded_data()
    with alone(workspace, context.log.info):
        read = reading(context, workspace, "trajectories")
        found = ingest(data, workspace.config.split, progress_of(context, workspace))
        sources = sorted(set(found.counts["source"].to_pylist()))
        inside = sql_list(sources)
        with workspace.lake() as lake:
            snapshot = lake.publish(
                AUTHOR,
                f"ingest of {data.name}: {found.trajectories.num_rows:,} trajectories",
                [
                    Replace("trajectories", found.trajectories, of_sources(sources)),
                    Replace("preferences", found.preferences, of_sources(sources)),
                    Replace("policies", found.policies, f"source in ({inside})"),
                    Replace("prompts", found.prompts, f"source in ({inside})"),
                    Replace("quarantine", found.quarantine, _own_files(workspace, data)),
                    replace_counts(found.counts, "ingest", sources),
                ],
            )
        workspace.work_dir.mkdir(parents=True, exist_ok=True)
        workspace.sources_file.write_text(json.dumps(sources), encoding="utf-8")
        files = sorted(set(found.quarantine["file"].to_pylist()))
        workspace.quarantined_file.write_text(json.dumps(files), encoding="utf-8")
    for name in stages(recorded=True)["recorded"].outputs:
        table: pa.Table = getattr(found, name)
        metadata: dict[str, Any] = {
            "dagster/row_count": table.num_rows,
            "quarantined": found.quarantine.num_rows,
            "snapshot": snapshot,
            **table_link(name),
        }
        if "source" in table.column_names:
            counted = table.group_by("source").aggregate([([], "count_all")]).to_pylist()
            rows = {row["source"]: row["count_all"] for row in counted}
            metadata["by source"] = plots.bars(f"{name} by source", rows)
        yield made(context, workspace, metadata, asset=name, read=read)


def _own_files(workspace: Workspace, data: Path) -> str:
    """SQL predicate: quarantined rows of these files, and of those of the import before."""
    place = workspace.quarantined_file
    before = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else []
    own = quoted(data.name if data.is_file() else f"{data.resolve().name}/")
    now = f"file = {own}" if data.is_file() else f"starts_with(file, {own})"
    return f"file in ({sql_list(before)}) or {now}"


@dg.asset(
    **asset_kwargs("duplicates"),
    pool="corpus",
    description="Equal and near-equal answers: exact hash, then MinHash-LSH verified by exact "
    "Jaccard, within each prompt and across the corpus.",
)
def duplicates(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """Clusters of repeated answers; nothing is removed."""
    from pipelines.dedup import dedup
    from pipelines.dedup_index import new_answers

    with scratch(workspace, "duplicates", context.log.info) as work, workspace.lake() as lake:
        read = reading(context, workspace, "duplicates")
        texts = work / "texts.parquet"
        sources = workspace.sources
        settings, index = workspace.config.dedup, workspace.dedup_index
        answers = (
            "trajectories t join prompts p using (prompt_id) "
            f"where p.source in ({sql_list(sources)})"
        )
        present = lake.query(f"select t.trajectory_id, t.content_hash from {answers}")
        new = new_answers(index, settings, present)
        if new is None:  # all answers are new to it
            shutil.rmtree(index, ignore_errors=True)
            new = np.arange(len(present))
        pq.write_table(present.select(["trajectory_id"]).take(pa.array(new)), work / "new.parquet")
        lake.copy(
            f"select t.trajectory_id, t.prompt_id, p.source, t.text, t.content_hash from {answers} "
            "and t.trajectory_id in "
            f"(select trajectory_id from read_parquet({sql_list([str(work / 'new.parquet')])})) "
            "order by t.prompt_id, t.trajectory_id",
            texts,
        )
        report = progress_of(context, workspace)
        result = dedup([texts], settings, work, report, index=index)
        snapshot = lake.publish(
            AUTHOR,
            f"duplicates: {result.duplicates.num_rows:,} members of clusters",
            [
                Replace(
                    "duplicates",
                    result.duplicates,
                    "trajectory_id in (select trajectory_id from trajectories where "
                    f"{of_sources(sources)}) or trajectory_id not in "
                    "(select trajectory_id from trajectories)",
                ),
                replace_counts(result.counts, "dedup", sources),
            ],
        )
        rows = lake.query(
            "select scope, kind, count(distinct cluster_id) as clusters, count(*) as members "
            "from duplicates group by all order by all"
        ).to_pylist()
    bars = {f"{row['scope']}, {row['kind']}": row["members"] for row in rows}
    return made(
        context,
        workspace,
        {
            "dagster/row_count": result.duplicates.num_rows,
            "answers": len(present),
            "new answers": len(new),
            "snapshot": snapshot,
            "clusters": plots.table(rows),
            "members": plots.bars("members of clusters", bars),
            **table_link("duplicates"),
        },
        read=read,
    )


@dg.asset(
    **asset_kwargs("pairs"),
    pool="corpus",
    freshness_policy=dg.FreshnessPolicy.time_window(
        warn_window=timedelta(days=8), fail_window=timedelta(days=15)
    ),
    description="Two answers to one prompt with a label: same_policy, cross_policy or ambiguous. "
    "What the rules and the budget leave out is counted.",
)
def pairs(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """Label every pair of answers to one prompt; keep those of the budget."""
    from pipelines.pairs import make_pairs
    from pipelines.pairs_balance import balance, label_shares, pair_rulers, rulers_sql

    with scratch(workspace, "pairs", context.log.info) as work, workspace.lake() as lake:
        read = reading(context, workspace, "pairs")
        sources = workspace.sources
        answers = lake.copy(input_sql(sources, workspace.signatures), work / "answers.parquet")
        result = make_pairs(
            work / "answers.parquet",
            workspace.config.pairs,
            work,
            progress=progress_of(context, workspace),
            workers=workspace.config.threads if answers >= MANY_ANSWERS else 1,
        )
        snapshot = lake.publish(
            AUTHOR,
            f"pairs: {result.rows:,} labelled",
            [
                Replace("pairs", result.files, of_sources_or_gone(sources)),
                Replace("pair_sums", result.sums, f"source in ({sql_list(sources)})"),
                replace_counts(result.counts, "pairs", sources),
            ],
        )
        changed = changes_of(context, workspace, lake, snapshot)
        rulers = pair_rulers(lake.query(rulers_sql(sources))).to_pylist()
    labels: dict[str, int] = {}
    for row in result.counts.to_pylist():
        if row["what"] == "out":
            labels[row["label"]] = labels.get(row["label"], 0) + row["rows"]
    return made(
        context,
        workspace,
        {
            "dagster/row_count": result.rows,
            "snapshot": snapshot,
            "labels": plots.bars("pairs by label", labels),
            "balance": plots.table(balance(result.sums).to_pylist()),
            "label shares": plots.table(label_shares(result.counts).to_pylist()),
            "rulers on pairs": plots.table(rulers),
            "kept out": count_plot("pairs kept out, by reason", result.counts),
            **changed,
            **table_link("pairs", "select label, count(*) from pairs group by 1"),
        },
        read=read,
    )


@dg.asset(
    **asset_kwargs("preferences"),
    pool="corpus",
    description="Right against wrong answers of the embedded pool, matched in length, with a "
    "reference that is worded differently.",
)
def preferences(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """Judgements by an exact check of the answers."""
    from pipelines import embedded

    with workspace.lake() as lake:
        source = workspace.pool.source
        found = embedded.preferences(
            lake.query(
                "select t.*, y.policy_group, y.split as policy_split from trajectories t "
                "join policies y using (policy_id) join prompts p using (prompt_id) "
                "where p.source = ? order by t.trajectory_id",
                [source],
            ),
            lake.query("from prompts where source = ? order by prompt_id", [source]),
            workspace.config.preferences,
        )
        snapshot = lake.publish(
            AUTHOR,
            f"preferences: {found.num_rows:,}",
            [Replace("preferences", found, of_sources_or_gone([source]))],
        )
    by_category = found.group_by("category").aggregate([([], "count_all")]).to_pylist()
    return made(
        context,
        workspace,
        {
            "dagster/row_count": found.num_rows,
            "snapshot": snapshot,
            "by category": plots.bars(
                "preferences", {row["category"]: row["count_all"] for row in by_category}
            ),
            **table_link("preferences", "from preference_by_category"),
        },
    )


@dg.asset(
    **asset_kwargs("groups"),
    pool="corpus",
    description="References with their candidates, balanced so that candidates alone tell "
    "nothing, and the groups files that training reads.",
)
def groups(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """Policy groups from answers, preference groups from preferences, and their files."""
    from pipelines.groups import make_groups
    from pipelines.groups_file import export_groups
    from pipelines.preference_groups import preference_groups

    with scratch(workspace, "groups", context.log.info) as work, workspace.lake() as lake:
        read = reading(context, workspace, "groups")
        sources = workspace.sources
        lake.copy(input_sql(sources), work / "answers.parquet")
        before = lake.snapshot()
        found, counts = make_groups(
            work / "answers.parquet",
            workspace.config.groups,
            work,
            snapshot=before,
            progress=progress_of(context, workspace),
        )
        preferred, preferred_counts = preference_groups(lake, sources, snapshot=before)
        snapshot = lake.publish(
            AUTHOR,
            f"groups: {found.num_rows:,} of policies, {preferred.num_rows:,} of preferences",
            [
                Replace(
                    "groups",
                    pa.concat_tables([found, preferred]),
                    of_sources_or_gone(sources),
                ),
                replace_counts(pa.concat_tables([counts, preferred_counts]), "groups", sources),
            ],
        )
        written = {}
        for wrapper in ("pretrain", "sft"):
            for split in ("train", "eval"):
                path = workspace.groups_file(wrapper, split)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name("snapshot").write_text(f"{snapshot}\n", encoding="utf-8")
                written[f"{wrapper}, {split}"] = export_groups(
                    lake, path, wrapper=wrapper, split=split, sources=sources
                )
    by_size = Counter(pc.list_value_length(found["candidates"]).to_pylist())
    return made(
        context,
        workspace,
        {
            "dagster/row_count": found.num_rows + preferred.num_rows,
            "snapshot": snapshot,
            "files": dg.MetadataValue.path(str(workspace.groups_file("sft", "eval").parent)),
            "groups": plots.bars("groups by wrapper and split", written),
            "groups of policies by candidates": plots.bars(
                f"up to {workspace.config.groups.candidates} candidates, fewer where fewer can",
                {str(size): n for size, n in sorted(by_size.items())},
            ),
            "kept out": count_plot("kept out, by reason", counts),
            **table_link("triples"),
        },
        read=read,
    )


def find_similar(workspace: Workspace, text: str, top: int) -> list[dict[str, Any]]:
    """Trajectories near a text, with their policy and text.

    Raises:
        ConfigError: this configuration's answers have no signatures.
    """
    from pipelines.similar import similar

    with workspace.lake(read_only=True) as lake:
        _require_signatures(workspace)

        def looked_up(keys: pa.Array) -> pa.Table:
            named = sql_list([str(key) for key in keys.to_pylist()])
            return lake.query(
                "select t.trajectory_id, t.text, y.name as policy from trajectories t "
                f"join policies y using (policy_id) where t.trajectory_id in ({named})"
            )

        found = similar(text, workspace.signatures, top=top, texts=looked_up)
        rows = {r["trajectory_id"]: r for r in looked_up(found["trajectory_id"]).to_pylist()}
    return [
        {**row, "trajectory_id": str(key), **{n: rows[key][n] for n in ("policy", "text")}}
        for row in found.to_pylist()
        if (key := row["trajectory_id"]) in rows
    ]


def _require_signatures(workspace: Workspace) -> None:
    if not workspace.signatures.is_dir():
        places = (workspace.home / "staging").glob("*/dedup-index/signatures")
        others = ", ".join(sorted(place.parents[1].name for place in places))
        msg = (
            f"{workspace.home} has no signatures of the configuration {workspace.config.name!r}: "
            f"make them with polar run --config {workspace.config_path}"
            + (" --data FOLDER" if workspace.config.is_recorded else "")
            + " --until duplicates"
            + (f", or give --config for one that has: {others}" if others else "")
        )
        raise ConfigError(msg)


POOL_ASSETS = [preferences]
ASSETS = [duplicates, pairs, groups]
