"""What must hold: blocking checks on assets. A failing one names rows and stops what follows.

Most are SQL on the lake that returns the rows at fault; the others look into groups files and
checkpoints.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import dagster as dg
import pyarrow.parquet as pq

from assets.staleness import CONFIG_TAG
from assets.workspace import Workspace
from pipelines.balance import LEAKAGE_SQL
from pipelines.errors import ConfigError
from pipelines.labels import sql_list
from pipelines.lake import Lake
from pipelines.schemas import SPLITS, TABLES

SHOWN = 20
NO_LAKE: list[dict[str, Any]] = [{"lake": "missing"}]
SAME_POLICY_BOUNDS = (0.05, 0.60)
MANY_SAMPLES, ONE_SEED = 50, 0.98  # further samples, and the share of equal ones that is no chance
_IDENTICAL = """
with drawn as (
    select policy_id, prompt_id, sampling_id, count(*) as samples,
           count(distinct content_hash) as texts
    from trajectories where seed is not null and temperature > 0
    group by policy_id, prompt_id, sampling_id having count(*) > 1
)
select y.name, sum(samples - 1)::bigint as repeats,
       sum(samples - texts) / sum(samples - 1) as identical
from drawn join policies y using (policy_id) group by y.name order by y.name
"""


def _keys_unique(table: str) -> str:
    key = ", ".join(TABLES[table].key)
    return f"select {key}, count(*) as times from {table} group by {key} having count(*) > 1"


def _missing(table: str, column: str, parent: str, parent_key: str) -> str:
    return (
        f"select '{column}' as reference, {column}::varchar as value, count(*) as row_count "
        f"from {table} where {column} is not null "
        f"and {column} not in (select {parent_key} from {parent}) group by 1, 2"
    )


def _resolve(table: str, **columns: str) -> str:
    """Rows of `table` whose columns point at nothing; columns map to their parent tables."""
    return " union all ".join(
        _missing(table, column, parent, TABLES[parent].key[0]) for column, parent in columns.items()
    )


def _balanced(stage: str) -> str:
    return (
        "select source, sum(rows) filter (what = 'in') as went_in, "
        "coalesce(sum(rows) filter (what <> 'in'), 0) as came_out "
        f"from counts where stage = '{stage}' group by source having went_in <> came_out"
    )


_GROUP_MEMBERS = """
select group_id::varchar as group_id, member::varchar as trajectory_id from (
    select group_id, reference as member from groups
    union all
    select group_id, unnest(candidates).trajectory_id from groups
) where member not in (select trajectory_id from trajectories)
"""


def _leaks(rule: str) -> str:
    return f"select * from leakage where rule like '{rule}'"


# (asset, name, what must hold, query for the rows at fault)
_SQL: tuple[tuple[str, str, str, str], ...] = (
    *((t, "keys_unique", f"No two rows of {t} share a key.", _keys_unique(t)) for t in
      ("policies", "prompts", "trajectories", "duplicates", "pairs", "preferences", "groups")),
    ("policies", "one_side", "No policy group is on both sides.", _leaks("a policy group%")),
    ("prompts", "one_side", "No prompt group is on both sides.", _leaks("a prompt group%")),
    ("trajectories", "references_resolve", "Every prompt and policy named exists.",
     _resolve("trajectories", prompt_id="prompts", policy_id="policies")),
    ("trajectories", "nothing_lost", "What was wanted or read is there or counted with its reason.",
     f"{_balanced('ingest')} union all {_balanced('rollouts')}"),
    ("trajectories", "summed", "Their sums by policy say what the answers themselves say.",
     "select * from (select policy_id, count(*) as answers, sum(original_length) as characters "
     "from trajectories group by all) full join (select policy_id, trajectories, "
     "s.characters as summed from answer_sums as s where trajectories > 0) using (policy_id) "
     "where answers is distinct from trajectories or characters is distinct from summed"),
    ("duplicates", "references_resolve", "Every trajectory named exists.",
     _resolve("duplicates", trajectory_id="trajectories")),
    ("duplicates", "nothing_lost", "What went in came out or is counted.", _balanced("dedup")),
    ("pairs", "references_resolve", "Every trajectory named exists.",
     _resolve("pairs", trajectory_a="trajectories", trajectory_b="trajectories",
              prompt_id="prompts")),
    ("pairs", "ordered", "trajectory_a < trajectory_b.",
     "select trajectory_a, trajectory_b from pairs where trajectory_a >= trajectory_b"),
    ("pairs", "no_leak", "No pair crosses sides; its cell and split are those of its parts.",
     _leaks("a pair %")),
    ("pairs", "summed", "Their sums by policy say what the pairs themselves say.",
     "select * from (select cell, label, count(*) as pairs from pairs group by all) full join "
     "(select cell, label, sum(pairs) as summed from pair_sums group by all) using (cell, label) "
     "where pairs is distinct from summed"),
    ("pairs", "nothing_lost", "What went in came out or is counted.", _balanced("pairs")),
    ("preferences", "references_resolve", "Every trajectory named exists.",
     _resolve("preferences", reference="trajectories", chosen="trajectories",
              rejected="trajectories", prompt_id="prompts")),
    ("groups", "references_resolve", "Every trajectory named exists.", _GROUP_MEMBERS),
    ("groups", "no_leak", "No training group holds a held-out prompt, policy or reference.",
     LEAKAGE_SQL),
)  # fmt: skip


def _sql_checks(asset: str) -> dg.AssetChecksDefinition:
    """All SQL checks of one asset in one step."""
    queries = {name: (holds, sql) for of, name, holds, sql in _SQL if of == asset}
    specs = [
        dg.AssetCheckSpec(name, asset=asset, description=holds, blocking=True)
        for name, (holds, _) in queries.items()
    ]

    @dg.multi_asset_check(name=f"{asset}_rows", specs=specs)
    def check(workspace: dg.ResourceParam[Workspace]) -> Iterator[dg.AssetCheckResult]:
        for name, (_, sql) in queries.items():
            yield _verdict(workspace, _faults(workspace, sql), name=name, asset=asset)

    return check


def _faults(workspace: Workspace, sql: str) -> list[dict[str, Any]]:
    lake = workspace.reader()
    if lake is None:
        return NO_LAKE
    return lake.query(f"select * from ({sql}) limit {SHOWN}").to_pylist()


def _verdict(
    workspace: Workspace,
    rows: list[dict[str, Any]],
    *,
    name: str | None = None,
    asset: str | None = None,
    numbers: Mapping[str, str] | None = None,
) -> dg.AssetCheckResult:
    metadata: dict[str, Any] = {**(numbers or {}), CONFIG_TAG: workspace.config.name}
    if rows:
        shown = [", ".join(f"{key}={value}" for key, value in row.items()) for row in rows]
        metadata["rows at fault"] = "\n".join(shown)
    return dg.AssetCheckResult(passed=not rows, check_name=name, asset_key=asset, metadata=metadata)


Found = tuple[list[dict[str, Any]], dict[str, str]]
"""Rows at fault, and the numbers that they were judged by."""


def _number_check(
    asset: str, name: str, holds: str, find: Callable[[Workspace, Lake], Found]
) -> dg.AssetChecksDefinition:
    """A check that judges numbers of the lake, and shows them."""

    @dg.asset_check(asset=asset, name=name, description=holds, blocking=True)
    def check(workspace: dg.ResourceParam[Workspace]) -> dg.AssetCheckResult:
        lake = workspace.reader()
        rows, numbers = find(workspace, lake) if lake else (NO_LAKE, {})
        return _verdict(workspace, rows, numbers=numbers)

    return check


def _label_shares(workspace: Workspace, lake: Lake) -> Found:
    """The same-policy share of each split, counted after the budget."""
    from pipelines.pairs_balance import label_shares

    low, high = SAME_POLICY_BOUNDS
    sources = sql_list(workspace.sources)
    counts = lake.query(f"from counts where stage = 'pairs' and source in ({sources})")
    rows = [
        row
        for row in label_shares(counts).to_pylist()
        if row["source"] == "all" and row["split"] in SPLITS
    ]
    shown = {row["split"]: f"{row['share']:.3f}, possible: {row['possible']}" for row in rows}
    return [row for row in rows if row["possible"] and not low <= row["share"] <= high], shown


def _equal_samples(_: Workspace, lake: Lake) -> Found:
    """The share of equal texts among samples of one policy on one prompt, for each policy."""
    rows = lake.query(_IDENTICAL).to_pylist()
    shown = {row["name"]: f"{row['identical']:.3f} of {row['repeats']:,}" for row in rows}
    same = [row for row in rows if row["repeats"] >= MANY_SAMPLES and row["identical"] >= ONE_SEED]
    return same, shown


@dg.asset_check(
    asset="groups",
    name="reference_blind",
    description="A ruler that sees candidates but no reference stays at 0.50 in its interval.",
    blocking=True,
)
def reference_blind(workspace: dg.ResourceParam[Workspace]) -> dg.AssetCheckResult:
    """If candidates alone give the label away, no model has to look at the reference.

    Raises:
        ConfigError: there is nothing to pre-train on.
    """
    from trainer.evaluate import reference_blind_check

    train, held_out = (workspace.groups_file("pretrain", split) for split in ("train", "eval"))
    if train.is_file() and not pq.read_metadata(train).num_rows:
        msg = (
            "no groups to pre-train on: they need prompts of the training side to which two "
            "policies of different groups gave two answers each, none blank or like another"
        )
        judged = workspace.groups_file("sft", "train")
        if pq.read_metadata(judged).num_rows:
            msg += (
                ". The judgements can fine-tune a checkpoint: "
                f"polar finetune CHECKPOINT --data {judged} --out FOLDER"
            )
        raise ConfigError(msg)
    rows = reference_blind_check(train, held_out)
    shown = {
        f"{row['split']}, {row['cell']}": f"{row['value']:.3f} [{row['low']:.3f}, "
        f"{row['high']:.3f}], n = {row['n']:,}"
        for row in rows
    }
    return _verdict(workspace, [row for row in rows if row["leaks"]], numbers=shown)


def _checkpoint_check(asset: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=asset, name="finite", description="No weight is NaN or infinite.", blocking=True
    )
    def check(workspace: dg.ResourceParam[Workspace]) -> dg.AssetCheckResult:
        import torch
        from safetensors.torch import load_file

        folder = workspace.checkpoint(asset)
        files = sorted(folder.glob("*.safetensors"))
        faults = [] if files else [{"folder": str(folder), "weights": "missing"}]
        for file in files:
            for name, tensor in load_file(file).items():
                if not torch.isfinite(tensor).all():
                    faults.append({"file": file.name, "tensor": name})
        return _verdict(workspace, faults)

    return check


@cache
def _checks() -> tuple[dg.AssetChecksDefinition, ...]:
    assets = dict.fromkeys(asset for asset, *_ in _SQL)
    checkpoints = ("backbone", "pretrained", "finetuned", "finetuned_alone")
    return (
        *(_sql_checks(asset) for asset in assets),
        *(_checkpoint_check(asset) for asset in checkpoints),
        _number_check(
            "pairs",
            "label_shares",
            "The same-policy share of each split is within 5 % and 60 %, where the answers allow "
            "both labels.",
            _label_shares,
        ),
        _number_check(
            "trajectories",
            "samples_differ",
            "A policy that draws gives its samples different texts; all alike means that they "
            "were drawn with one seed.",
            _equal_samples,
        ),
        reference_blind,
    )


def all_checks() -> list[dg.AssetChecksDefinition]:
    """Every check."""
    return list(_checks())


def check_keys() -> list[dg.AssetCheckKey]:
    """The key of every check."""
    return [key for check in _checks() for key in check.check_keys]
