"""Checks on groups that need no model: what candidates alone could ever tell, and what leaks.

Exact counting only; learned rulers belong to the trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import ids

if TYPE_CHECKING:
    from pipelines.lake import Lake

LEAKAGE_SQL = """
with held as (
    select reference from groups
    where wrapper = 'pretrain' and split = 'eval' and cell = 'seen'
),
trained as (
    select group_id, reference as trajectory_id from groups
    where wrapper = 'pretrain' and split = 'train'
    union all
    select group_id, unnest(candidates).trajectory_id from groups
    where wrapper = 'pretrain' and split = 'train'
)
select rule, id, detail from leakage
union all
select 'a held-back reference in a train group', trajectory_id::varchar, group_id::varchar
from trained where trajectory_id in (select reference from held)
"""


def leakage(lake: Lake) -> pa.Table:
    """Rows that break the split; none in a sound lake.

    Returns:
        rule, id and detail: those of the view `leakage`, and answers held back for evaluation on
        the train side that stand in a train group.
    """
    return lake.query(LEAKAGE_SQL)


def policy_balance(groups: pa.Table) -> pa.Table:
    """How often each policy wins and loses, as a candidate, in policy groups.

    Returns:
        policy_id, positive and negative: comparisons with the other candidates of a group that it
        wins and loses; equal for every policy, or its name alone would tell something.
    """
    members, group = _flat(groups)
    codes, names = ids.codes(members.field("policy_id"))
    first = members.field("rank").to_numpy() == 0
    lost = (~first).astype(np.int64)
    won = np.where(first, np.bincount(group, lost, len(groups))[group], 0)
    columns = {
        "policy_id": pa.ExtensionArray.from_storage(pa.uuid(), names),
        "positive": pa.array(np.bincount(codes, won, len(names)).astype(np.int64)),
        "negative": pa.array(np.bincount(codes, lost, len(names)).astype(np.int64)),
    }
    return pa.table(columns)


def blind_bound(groups: pa.Table) -> pa.Table:
    """The best that any score of the candidates alone could reach on policy groups.

    A comparison "p before n" is mirrored where "n before p" stands elsewhere in the same split and
    cell: a score that does not see the reference is right on exactly one of the two.

    Returns:
        split, cell, comparisons, unmirrored, and bound: no reference-blind ruler is right on more
        than this share, nor on less than one minus it; 0.5 where all is mirrored.
    """
    positive, negative, group = _comparisons(groups)
    flip = positive > negative
    low, high = np.where(flip, negative, positive), np.where(flip, positive, negative)
    places = pc.binary_join_element_wise(groups["split"], groups["cell"], " ")
    encoded = places.combine_chunks().dictionary_encode()
    place = encoded.indices.to_numpy(zero_copy_only=False)[group]
    key, at = np.unique(np.column_stack([place, low, high]), axis=0, return_inverse=True)
    surplus = np.abs(np.bincount(at.ravel(), np.where(flip, -1, 1), len(key)))
    rows = []
    for code, name in enumerate(encoded.dictionary.to_pylist()):
        comparisons = int((place == code).sum())
        unmirrored = int(surplus[key[:, 0] == code].sum())
        bound = 0.5 + unmirrored / (2 * max(comparisons, 1))
        rows.append((*name.split(" "), comparisons, unmirrored, bound))
    names = ("split", "cell", "comparisons", "unmirrored", "bound")
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in sorted(rows)])


def _flat(groups: pa.Table) -> tuple[pa.StructArray, np.ndarray]:
    """All candidates, group by group, and the row of the group of each."""
    lists = groups["candidates"].combine_chunks()
    sizes = lists.value_lengths().to_numpy()
    return lists.flatten(), np.repeat(np.arange(len(lists)), sizes)


def _comparisons(groups: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of positive and negative, and the group's row, of every comparison."""
    members, group = _flat(groups)
    codes, _ = ids.codes(members.field("trajectory_id"))
    first = members.field("rank").to_numpy() == 0
    best = np.zeros(len(groups), np.int64)
    best[group[first]] = codes[first]
    return best[group[~first]], codes[~first], group[~first]
