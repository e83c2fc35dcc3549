"""What changed between two snapshots of the lake: rows, policies, balance, duplicates.

    difference(lake, 12, 34)        facts, as plain JSON

Counts and aggregates only, so that it stays quick where tables are large; which keys joined and
left is told for policies, prompts and trajectories.
"""

from __future__ import annotations

from pipelines.errors import LakeError
from pipelines.facts import Facts, publish_of
from pipelines.lake import Lake
from pipelines.schemas import TABLES
from pipelines.sums import SUMS

KEYED = ("policies", "prompts", "trajectories")  # whose keys are compared one by one
_BALANCE = (
    "select split, label, coalesce(reason, '') as reason, count(*) as pairs, "
    "round(count(*) / sum(count(*)) over (partition by split), 4) as share from pairs "
    "group by split, label, reason"
)
_DUPLICATES = (
    "select scope, kind, count(distinct cluster_id) as clusters, count(*) as members "
    "from duplicates group by all"
)
_ANSWERS = (
    "select p.source, p.name, count(t.trajectory_id) as trajectories from policies p "
    "left join trajectories t using (policy_id) group by all"
)
_KEPT_OUT = (
    "select stage, what, reason, sum(rows)::bigint as rows from counts "
    "where what in ('excluded', 'quarantined') group by all"
)


def difference(lake: Lake, before: int, after: int) -> Facts:
    """What `after` has and `before` has not, and the other way round.

    Returns:
        `before` and `after` (snapshot, time, author, message); `rows` of each table, with `joined`
        and `left` keys for some; `policies` that joined, left, or have another number of
        trajectories; `balance` (pairs by split, label and reason, with shares of the split);
        `duplicates` by scope and kind; `kept_out` by stage and reason. Only lines that differ.

    Raises:
        LakeError: one of them is not there, or was expired.
    """
    heads = [_head(lake, snapshot) for snapshot in (before, after)]
    policies = _changed(lake, _ANSWERS, ("source", "name"), before, after)
    return {
        "before": heads[0],
        "after": heads[1],
        "rows": _tables(lake, before, after),
        "policies": [
            {
                **line,
                "state": "joined"
                if line["trajectories before"] is None
                else "left"
                if line["trajectories after"] is None
                else "answered",
            }
            for line in policies
        ],
        "balance": _changed(lake, _BALANCE, ("split", "label", "reason"), before, after),
        "duplicates": _changed(lake, _DUPLICATES, ("scope", "kind"), before, after),
        "kept_out": _changed(lake, _KEPT_OUT, ("stage", "what", "reason"), before, after),
    }


def _head(lake: Lake, snapshot: int) -> Facts:
    found = publish_of(lake, snapshot)
    if found is None:
        msg = f"there is no snapshot {snapshot}: it was never made, or expired; "
        msg += '`polar sql "from lake.snapshots()"` lists all'
        raise LakeError(msg)
    return found


def _tables(lake: Lake, before: int, after: int) -> list[Facts]:
    names = [name for name in TABLES if name not in SUMS]
    counts = " union all ".join(
        f"select '{name}' as \"table\", (select count(*) from {name} at (version => {before})) "
        f"as before, (select count(*) from {name} at (version => {after})) as after"
        for name in names
    )
    rows = {row["table"]: row for row in lake.query(counts).to_pylist()}
    found = [rows[name] for name in names]
    for row in found:
        if row["table"] in KEYED:
            row |= _keys(lake, row["table"], before, after)
    return [row for row in found if row["before"] != row["after"] or row.get("joined")]


def _keys(lake: Lake, table: str, before: int, after: int) -> Facts:
    key = TABLES[table].key[0]
    (row,) = lake.query(
        f"with a as (select {key} from {table} at (version => {before})), "
        f"b as (select {key} from {table} at (version => {after})) "
        f"select (select count(*) from b anti join a using ({key})) as joined, "
        f'(select count(*) from a anti join b using ({key})) as "left"'
    ).to_pylist()
    return row


def _changed(lake: Lake, sql: str, keys: tuple[str, ...], before: int, after: int) -> list[Facts]:
    """Lines of an aggregate that differ, with its numbers `before` and `after`; null: no line."""
    sides = [
        {tuple(row[key] for key in keys): row for row in lake.query(sql, snapshot=at).to_pylist()}
        for at in (before, after)
    ]
    lines = []
    for key in sorted({*sides[0], *sides[1]}):
        old, new = (side.get(key) for side in sides)
        if old == new:
            continue
        line: Facts = dict(zip(keys, key, strict=True))
        for number in [name for name in (new or old or {}) if name not in keys]:
            line[f"{number} before"] = old[number] if old else None
            line[f"{number} after"] = new[number] if new else None
        lines.append(line)
    return lines
