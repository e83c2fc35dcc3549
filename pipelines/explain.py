"""The whole way of one trajectory, pair or checkpoint, read from the lake as nested facts.

    explain(lake, "4be1c2")              a trajectory or a checkpoint, by an unambiguous prefix
    explain(lake, "4be1c2:90aa17")       a pair: its two trajectories

What is found is plain JSON; the terminal's form of it is in `assets`. With the engine `local`
the facts are enough to make a trajectory again: `remake.py` does that.
"""

from __future__ import annotations

import json
import re

import numpy as np

from pipelines.errors import QueryError
from pipelines.facts import Facts, facts_of, plain, publish_of
from pipelines.ids import content_id
from pipelines.labels import EXCLUSIONS, input_sql, label_pairs, read_answers
from pipelines.lake import Lake

_HEX = re.compile(r"[0-9a-f]{3,32}")
_FINDABLE = {"trajectories": "trajectory_id", "checkpoints": "checkpoint_id"}
_RULES = {
    "same_policy": "two different samples of one policy on one prompt",
    "cross_policy": "samples of two different policies on one prompt",
    "exact": "the two answers have one text, so that likeness would give any label away",
    "near": "the two answers are near-duplicates, so that likeness would give any label away",
    "empty": "one of the answers shows nothing",
    "related": "two policies of one policy_group without declared lineage steps: they may be one",
}
_EXCLUDED = {
    "": "the budget of `pairs` left it out, or `pairs` was not made since",
    "unknown_policy": "one of the answers is of a policy that is not known",
    "mixed_sides": "one policy is held out and the other is not",
    "sampling": "two samples of one policy, drawn in different ways (pairs.require_same_sampling)",
}


def explain(lake: Lake, given: str) -> Facts:
    """All that the lake knows of how something came to be and what became of it.

    Args:
        lake: an open lake.
        given: an id of a trajectory or checkpoint, or `A:B` for the pair of two trajectories; in
            full or as a beginning of at least three hex digits that only one has.

    Raises:
        QueryError: no id, one that nothing has, one that several have, or two that are no pair.
    """
    if ":" in given:
        one, two = (_find(lake, part, ("trajectories",))[1] for part in given.split(":", 1))
        return _pair(lake, one, two)
    table, key = _find(lake, given, tuple(_FINDABLE))
    return {"trajectories": _trajectory, "checkpoints": _checkpoint}[table](lake, key)


def _find(lake: Lake, given: str, tables: tuple[str, ...]) -> tuple[str, str]:
    """The table and full id that an id or its beginning names."""
    start = given.strip().lower().replace("-", "")
    if not _HEX.fullmatch(start):
        msg = (
            f"{given!r} is no id: give at least 3 hex digits of a trajectory or checkpoint, or two "
            "trajectories as A:B for a pair"
        )
        raise QueryError(msg)
    low, high = (_dashed(start.ljust(32, fill)) for fill in "0f")
    found = lake.query(
        " union all ".join(
            f"(select '{table}' as found_in, {_FINDABLE[table]}::varchar as id from {table} "
            f"where {_FINDABLE[table]} between '{low}'::uuid and '{high}'::uuid "
            "order by id limit 4)"
            for table in tables
        )
    ).to_pylist()
    if not found:
        msg = (
            f"no {' and no '.join(_FINDABLE[table].removesuffix('_id') for table in tables)} "
            f"begins with {given!r}"
        )
        raise QueryError(msg)
    if len(found) > 1:
        those = ", ".join(f"{row['id']} ({row['found_in']})" for row in found[:3])
        msg = f"{given!r} is ambiguous: {those}{' and more' if len(found) > 3 else ''}; add digits"
        raise QueryError(msg)
    return found[0]["found_in"], found[0]["id"]


def _dashed(digits: str) -> str:
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _trajectory(lake: Lake, key: str) -> Facts:
    facts, published = _origin(lake, key)
    return {
        "kind": "trajectory",
        **facts,
        "pairs": facts_of(
            lake,
            "select label, reason, split, count(*) as pairs from pairs "
            "where trajectory_a = $1 or trajectory_b = $1 group by all order by all",
            key,
        ),
        "published": _snapshot(lake, published),
        "checkpoints": _trained(lake, [key]),
    }


def _origin(lake: Lake, key: str) -> tuple[Facts, int]:
    """How a trajectory came to be and what repeats it, and the snapshot that published it."""
    (row,) = lake.query(
        "select *, snapshot_id from trajectories where trajectory_id = ?", [key]
    ).to_pylist()
    prompts = facts_of(lake, "select * from prompts where prompt_id = ?", str(row["prompt_id"]))
    policies = facts_of(
        lake,
        "select y.*, p.name as parent_name from policies y left join policies p "
        "on p.policy_id = y.parent where y.policy_id = ?",
        str(row["policy_id"]),
    )
    published = row.pop("snapshot_id")
    sampling = {
        name: _exact(row.pop(name)) for name in ("temperature", "top_p", "top_k", "max_tokens")
    }
    drawn = content_id("sampling", *sampling.values()) == row["sampling_id"].bytes
    facts = {
        "trajectory": plain(row),
        "sampling": {**sampling, "exact": drawn if row["seed"] is not None else None},
        "policy": policies[0] if policies else {},
        "prompt": prompts[0] if prompts else {},
        "duplicates": facts_of(
            lake,
            "select scope, kind, size, representative, cluster_id from duplicates "
            "where trajectory_id = ? order by scope",
            key,
        ),
    }
    return facts, published


def _pair(lake: Lake, one: str, two: str) -> Facts:
    low, high = sorted((one, two))
    rows = lake.query(
        "select *, snapshot_id from pairs where trajectory_a = ? and trajectory_b = ?", [low, high]
    ).to_pylist()
    if not rows:
        msg = f"there is no pair of {low} and {high}: {_why_no_pair(lake, low, high)}"
        raise QueryError(msg)
    row = rows[0]
    published = row.pop("snapshot_id")
    sides = [_origin(lake, key)[0] for key in (low, high)]
    prompts = [side.pop("prompt") for side in sides]
    return {
        "kind": "pair",
        "pair": plain(row),
        "label rule": _RULES[row["reason"] or row["label"]],
        "trajectories": sides,
        "prompt": prompts[0],
        "published": _snapshot(lake, published),
        "checkpoints": _trained(lake, [low, high]),
    }


def _why_no_pair(lake: Lake, one: str, two: str) -> str:
    rows = lake.query(
        "select t.prompt_id, p.source from trajectories t left join prompts p using (prompt_id) "
        "where trajectory_id in (?, ?)",
        [one, two],
    ).to_pylist()
    if one == two:
        return "they are one trajectory"
    if len({row["prompt_id"] for row in rows}) > 1:
        return "they answer different prompts"
    source = rows[0]["source"] or ""
    answers = lake.query(
        f"select * from ({input_sql([source])}) where trajectory_id in (?, ?)", [one, two]
    )
    if len(answers) < 2:
        return "their prompt or a policy of theirs is not in the lake any more"
    apart = lake.query(
        "select 1 from counts where stage = 'pairs' and source = ? and reason = 'sampling' limit 1",
        [source],
    )
    judged = label_pairs(
        read_answers(answers), np.array([0]), np.array([1]), require_same_sampling=len(apart) > 0
    )
    return _EXCLUDED[EXCLUSIONS[judged.exclusion[0]]]


def _checkpoint(lake: Lake, key: str) -> Facts:
    lineage = _checkpoint_rows(lake, key)
    while parent := lineage[-1]["parent"]:
        rows = _checkpoint_rows(lake, parent)
        if not rows or parent in (known["checkpoint_id"] for known in lineage):
            break
        lineage += rows
    checkpoint = lineage[0]
    for name in ("configuration", "metrics"):
        checkpoint[name] = json.loads(checkpoint[name])
    snapshot = checkpoint["snapshot"]
    there = _there(lake, snapshot)
    return {
        "kind": "checkpoint",
        "checkpoint": checkpoint,
        "parents": [
            {name: row[name] for name in ("checkpoint_id", "name", "stage", "snapshot")}
            for row in lineage[1:]
        ],
        "read": _snapshot(lake, snapshot) if snapshot is not None else None,
        "groups": _groups(lake, snapshot) if there else [],
        "policies": _pool(lake, snapshot) if there else [],
        "evaluations": facts_of(
            lake,
            "select suite, cell, category, scorer, value, low, high, n, snapshot from evaluations "
            "where checkpoint_id = ? and metric = 'accuracy' and category = 'all' order by all",
            key,
        ),
    }


def _checkpoint_rows(lake: Lake, key: str) -> list[Facts]:
    return facts_of(lake, "select * from checkpoints where checkpoint_id = ?", key)


def _groups(lake: Lake, snapshot: int) -> list[Facts]:
    """Groups that the publish of this snapshot brought: of one configuration, and all of it."""
    return facts_of(
        lake,
        "select wrapper, split, cell, count(*) as groups from groups where snapshot_id = $1 "
        "group by all order by all",
        snapshot,
        snapshot=snapshot,
    )


def _pool(lake: Lake, snapshot: int) -> list[Facts]:
    """Policies whose answers stand in the training groups of a snapshot."""
    return facts_of(
        lake,
        "select y.name, y.revision, y.engine, count(distinct m.id) as trajectories "
        "from (select reference as id from groups where snapshot_id = $1 and split = 'train' "
        "union all select unnest(candidates).trajectory_id from groups "
        "where snapshot_id = $1 and split = 'train') m "
        "join trajectories t on t.trajectory_id = m.id join policies y using (policy_id) "
        "group by all order by y.name",
        snapshot,
        snapshot=snapshot,
    )


def _trained(lake: Lake, keys: list[str]) -> list[Facts]:
    """Checkpoints that read groups with all of these trajectories, and in which role."""
    checkpoints = lake.query(
        "select checkpoint_id::varchar as checkpoint_id, name, stage, path, snapshot "
        "from checkpoints where snapshot is not null order by created_at"
    ).to_pylist()
    found = []
    roles_at: dict[int, dict[str, list[Facts]]] = {}
    for checkpoint in checkpoints:
        at = checkpoint["snapshot"]
        if at not in roles_at:
            roles_at[at] = _roles(lake, at, keys) if _there(lake, at) else {}
        wrappers = {"pretrain": ["pretrain"], "finetune": ["sft"]}
        read = wrappers.get(checkpoint["stage"], ["pretrain", "sft"])
        roles = [role for wrapper in read for role in roles_at[at].get(wrapper, [])]
        if roles:
            found.append({**checkpoint, "groups": roles})
    return found


def _roles(lake: Lake, snapshot: int, keys: list[str]) -> dict[str, list[Facts]]:
    """Training groups of a snapshot that hold all trajectories, by wrapper."""
    rows = lake.query(
        "select wrapper, group_id::varchar as group_id, reference::varchar as reference, "
        "[c.trajectory_id::varchar for c in candidates] as members, "
        "[c.rank for c in candidates] as ranks from groups "
        "where snapshot_id = $1 and split = 'train' and "
        + " and ".join(
            f"(reference = '{key}'::uuid or "
            f"list_contains([c.trajectory_id for c in candidates], '{key}'::uuid))"
            for key in keys
        )
        + " order by group_id",
        [snapshot],
        snapshot=snapshot,
    ).to_pylist()
    roles: dict[str, list[Facts]] = {}
    for row in rows:
        ranks = dict(zip(row["members"], row["ranks"], strict=True))
        told = [
            "reference" if key == row["reference"] else f"candidate of rank {ranks[key]}"
            for key in keys
        ]
        roles.setdefault(row["wrapper"], []).append(
            {"group_id": row["group_id"], "role": ", ".join(told)}
        )
    return roles


def _there(lake: Lake, snapshot: int | None) -> bool:
    """Whether a snapshot can still be read."""
    return snapshot is not None and publish_of(lake, snapshot) is not None


def _snapshot(lake: Lake, snapshot: int) -> Facts:
    expired = {"snapshot": snapshot, "message": "expired: nothing named it"}
    return publish_of(lake, snapshot) or expired


def _exact(value: float | None) -> float | None:
    """The number that was meant: the lake keeps 32 bits of 0.9, and the shortest such is 0.9."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
