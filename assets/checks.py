"""What must hold: blocking checks on assets. A failing one names rows and stops what follows.

Most are SQL on the lake that returns the rows at fault; the others look into groups files and
checkpoints.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import dagster as dg

from assets.workspace import Workspace
from pipelines.schemas import TABLES

SHOWN = 20
SAME_POLICY_BOUNDS = (0.05, 0.60)


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


_LABEL_SHARES = f"""
select split, avg((label = 'same_policy')::int) as same_policy_share, count(*) as pairs
from pairs where label <> 'ambiguous' group by split
having avg((label = 'same_policy')::int) not between {SAME_POLICY_BOUNDS[0]}
    and {SAME_POLICY_BOUNDS[1]}
"""

_ONE_SIDE = """
select {group} as leaking_group, count(distinct split) as sides
from {table} group by 1 having count(distinct split) > 1
"""

_GROUP_MEMBERS = """
select group_id::varchar as group_id, member::varchar as trajectory_id from (
    select group_id, reference as member from groups
    union all
    select group_id, unnest(candidates).trajectory_id from groups
) where member not in (select trajectory_id from trajectories)
"""

_CROSSING_GROUPS = """
select g.group_id::varchar as group_id, g.cell, p.split as prompt_side, q.split as policy_side
from (
    select group_id, cell, split, wrapper, prompt_id, unnest(candidates).policy_id as policy_id
    from groups
    union all
    select g.group_id, g.cell, g.split, g.wrapper, g.prompt_id, t.policy_id
    from groups g join trajectories t on t.trajectory_id = g.reference
) g
join prompts p on p.prompt_id = g.prompt_id
join policies q on q.policy_id = g.policy_id
where g.split = 'train' and (p.split = 'test' or q.split = 'test')
    or g.wrapper = 'pretrain' and (p.split = 'test') <> (g.cell in ('new_prompt', 'both_new'))
    or g.wrapper = 'pretrain' and (q.split = 'test') <> (g.cell in ('new_policy', 'both_new'))
"""

_CROSSING_PAIRS = """
select e.trajectory_a::varchar as trajectory_a, e.trajectory_b::varchar as trajectory_b, e.cell,
    p.split as prompt_side, a.split as policy_a_side, b.split as policy_b_side
from pairs e
join prompts p using (prompt_id)
join trajectories ta on ta.trajectory_id = e.trajectory_a
join trajectories tb on tb.trajectory_id = e.trajectory_b
join policies a on a.policy_id = ta.policy_id
join policies b on b.policy_id = tb.policy_id
where a.split <> b.split
    or (p.split = 'test') <> (e.cell in ('new_prompt', 'both_new'))
    or (a.split = 'test') <> (e.cell in ('new_policy', 'both_new'))
    or (e.split = 'train') <> (e.cell = 'seen')
"""

# (asset, name, what must hold, query for the rows at fault)
_SQL: tuple[tuple[str, str, str, str], ...] = (
    *((t, "keys_unique", f"No two rows of {t} share a key.", _keys_unique(t)) for t in
      ("policies", "prompts", "trajectories", "duplicates", "pairs", "preferences", "groups")),
    ("policies", "one_side", "No policy group is on both sides.",
     _ONE_SIDE.format(group="policy_group", table="policies")),
    ("prompts", "one_side", "No prompt group is on both sides.",
     _ONE_SIDE.format(group="prompt_group", table="prompts")),
    ("trajectories", "references_resolve", "Every prompt and policy named exists.",
     _resolve("trajectories", prompt_id="prompts", policy_id="policies")),
    ("duplicates", "references_resolve", "Every trajectory named exists.",
     _resolve("duplicates", trajectory_id="trajectories")),
    ("duplicates", "nothing_lost", "What went in came out or is counted.", _balanced("dedup")),
    ("pairs", "references_resolve", "Every trajectory named exists.",
     _resolve("pairs", trajectory_a="trajectories", trajectory_b="trajectories",
              prompt_id="prompts")),
    ("pairs", "ordered", "trajectory_a < trajectory_b.",
     "select trajectory_a, trajectory_b from pairs where trajectory_a >= trajectory_b"),
    ("pairs", "label_shares", "The same-policy share of each split is within 5 % and 60 %.",
     _LABEL_SHARES),
    ("pairs", "no_leak", "No pair crosses sides; its cell and split are those of its parts.",
     _CROSSING_PAIRS),
    ("pairs", "nothing_lost", "What went in came out or is counted.", _balanced("pairs")),
    ("preferences", "references_resolve", "Every trajectory named exists.",
     _resolve("preferences", reference="trajectories", chosen="trajectories",
              rejected="trajectories", prompt_id="prompts")),
    ("groups", "references_resolve", "Every trajectory named exists.", _GROUP_MEMBERS),
    ("groups", "no_leak", "No training group holds a held-out prompt or policy.",
     _CROSSING_GROUPS),
)  # fmt: skip


def _sql_check(asset: str, name: str, holds: str, sql: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset=asset, name=name, description=holds, blocking=True)
    def check(workspace: dg.ResourceParam[Workspace]) -> dg.AssetCheckResult:
        with workspace.lake(read_only=True) as lake:
            rows = lake.query(f"select * from ({sql}) limit {SHOWN}").to_pylist()
        return _verdict(rows)

    return check


def _verdict(rows: list[dict[str, Any]], **numbers: float | str) -> dg.AssetCheckResult:
    shown = [", ".join(f"{k}={v}" for k, v in row.items()) for row in rows[:SHOWN]]
    metadata: dict[str, Any] = dict(numbers)
    if rows:
        metadata["rows at fault"] = "\n".join(shown)
    return dg.AssetCheckResult(passed=not rows, metadata=metadata)


@dg.asset_check(
    asset="trajectories",
    name="nothing_lost",
    description="Every answer that was wanted is there or counted with its reason.",
    blocking=True,
)
def trajectories_complete(workspace: dg.ResourceParam[Workspace]) -> dg.AssetCheckResult:
    """Counted in rows, not by the status of a run."""
    stage = "ingest" if workspace.config.is_recorded else "rollouts"
    with workspace.lake(read_only=True) as lake:
        return _verdict(lake.query(f"from ({_balanced(stage)}) limit {SHOWN}").to_pylist())


@dg.asset_check(
    asset="groups",
    name="reference_blind",
    description="A ruler that sees candidates but no reference stays at 0.50 in its interval.",
    blocking=True,
)
def reference_blind(workspace: dg.ResourceParam[Workspace]) -> dg.AssetCheckResult:
    """If candidates alone give the label away, no model has to look at the reference."""
    from trainer.evaluate import reference_blind_check

    rows = reference_blind_check(
        workspace.groups_file("pretrain", "train"), workspace.groups_file("pretrain", "eval")
    )
    beyond = [row for row in rows if not row["low"] <= 0.5 <= row["high"]]
    shown = {
        str(row["cell"]): f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] n={row['n']}"
        for row in rows
    }
    return _verdict(beyond, **shown)


def _checkpoint_check(asset: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=asset, name="finite", description="No weight is NaN or infinite.", blocking=True
    )
    def check(workspace: dg.ResourceParam[Workspace]) -> dg.AssetCheckResult:
        import torch
        from safetensors.torch import load_file

        faults = []
        for file in sorted(workspace.checkpoint(asset).glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                if not torch.isfinite(tensor).all():
                    faults.append({"file": file.name, "tensor": name})
        return _verdict(faults)

    return check


@cache
def _checks() -> tuple[dg.AssetChecksDefinition, ...]:
    made: list[dg.AssetChecksDefinition] = [_sql_check(*spec) for spec in _SQL]
    make: Callable[[str], dg.AssetChecksDefinition] = _checkpoint_check
    made += [make(name) for name in ("backbone", "pretrained", "finetuned", "finetuned_alone")]
    return (*made, trajectories_complete, reference_blind)


def all_checks() -> list[dg.AssetChecksDefinition]:
    """Every check."""
    return list(_checks())


def check_keys() -> list[dg.AssetCheckKey]:
    """The key of every check."""
    return [key for check in _checks() for key in check.check_keys]
