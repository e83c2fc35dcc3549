"""Preference groups: a reference, the answer that was chosen, and the one that was rejected.

Judgements come from the lake; what they say is not weighed here beyond a majority of equal ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines import ids
from pipelines.group_rows import CountKey, GroupRows, counts_table, split_name
from pipelines.labels import UNKNOWN, sql_list
from pipelines.schemas import cell_of

if TYPE_CHECKING:
    from pipelines.lake import Lake

# A side counts where the policy has a name: who wrote the other answers is not known.
SQL = """
with judged as (
    select r.*, p.source, p.split as prompt_side, coalesce(r.category, p.category) as topic
    from preferences r join prompts p on p.prompt_id = r.prompt_id
    where p.source in ({sources})
),
votes as (select reference, chosen, rejected, count(*) as n from judged group by all),
answers as (
    select t.trajectory_id, t.content_hash, t.policy_id,
        case when not starts_with(y.name, '{unknown}') then y.split end as side
    from trajectories t join policies y on y.policy_id = t.policy_id
    where t.prompt_id in (select prompt_id from judged)
)
select j.source, j.prompt_id, j.reference, j.chosen, j.rejected, j.topic as category,
    c.policy_id as chosen_policy, d.policy_id as rejected_policy, j.prompt_side,
    coalesce(a.side, c.side, d.side, 'train') as policy_side,
    case
        when j.reference is null then 'no_reference'
        when d.content_hash in (a.content_hash, c.content_hash) then 'same_text'
        when against.n > votes.n then 'outvoted'
        when against.n = votes.n then 'tied'
        when row_number() over (
            partition by j.reference, j.chosen, j.rejected order by j.preference_id
        ) > 1 then 'repeat'
        when 'train' in (a.side, c.side, d.side) and 'test' in (a.side, c.side, d.side)
        then 'mixed_sides'
        else ''
    end as reason
from judged j
join answers c on c.trajectory_id = j.chosen
join answers d on d.trajectory_id = j.rejected
left join answers a on a.trajectory_id = j.reference
left join votes
    on votes.reference = j.reference and votes.chosen = j.chosen and votes.rejected = j.rejected
left join votes against on against.reference = j.reference
    and against.chosen = j.rejected and against.rejected = j.chosen
order by j.prompt_id, j.preference_id
"""


def preference_groups(
    lake: Lake, sources: Sequence[str], *, snapshot: int
) -> tuple[pa.Table, pa.Table]:
    """One group of two candidates per judgement that has a reference.

    Train groups have prompt and named policies on the train side; the others are for evaluation,
    in the cell of their sides. Left out and counted: no reference, the rejected text equal to
    another, policies on both sides, judgements that are outvoted or tied, and repeats.

    Args:
        lake: where preferences, prompts, trajectories and policies are.
        sources: values of `prompts.source` to take.
        snapshot: the lake snapshot to note in the groups.

    Returns:
        Rows for schemas.GROUPS, and for schemas.COUNTS with the label `preferences`.
    """
    sql = SQL.format(sources=sql_list(sources), unknown=UNKNOWN)
    found = lake.query(sql, snapshot=snapshot)
    counts: Counter[CountKey] = Counter()
    sides = ("source", "reason", "prompt_side", "policy_side")
    splits, cells, kept = [], [], []
    for row, judged in enumerate(found.select(sides).to_pylist()):
        cell = cell_of(judged["prompt_side"], judged["policy_side"])
        split = "train" if cell == "seen" else "eval"
        reason = judged["reason"]
        where = "" if reason == "mixed_sides" else split_name(split, cell)
        counts[judged["source"], "in", "preferences", "", ""] += 1
        what = "excluded" if reason else "out"
        counts[judged["source"], what, "preferences", reason, where] += 1
        if not reason:
            kept.append(row)
            splits.append(split)
            cells.append(cell)
    found = found.take(pa.array(kept, pa.int64()))
    two = (("chosen", "rejected"), ("chosen_policy", "rejected_policy"))
    trajectories, policies = (_interleave(*(ids.storage(found[n]) for n in pair)) for pair in two)
    groups = GroupRows(
        prompt_id=ids.storage(found["prompt_id"]),
        reference=ids.storage(found["reference"]),
        size=np.full(len(kept), 2),
        candidate=trajectories,
        rank=np.tile([0, 1], len(kept)),
        policy_id=policies,
        relation=[""] * (2 * len(kept)),
        category=pa.array(found["category"].to_pylist(), pa.string()),
        split=splits,
        cell=cells,
    )
    return groups.table("sft", snapshot), counts_table(counts)


def _interleave(first: pa.Array, second: pa.Array) -> pa.Array:
    """first[0], second[0], first[1], second[1], ..."""
    order = np.arange(2 * len(first)).reshape(2, -1).T.ravel()
    return pa.concat_arrays([first, second]).take(pa.array(order))
