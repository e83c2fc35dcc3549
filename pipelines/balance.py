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
    codes, names, group = _candidates(groups, "policy_id")
    first = _positive(groups)
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


def _candidates(groups: pa.Table, column: str) -> tuple[np.ndarray, pa.Array, np.ndarray]:
    """Of all candidates: codes of an id column and what they mean, and the row of their group."""
    lists = groups["candidates"]
    group = np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy())
    codes, names = ids.codes(pc.struct_field(pc.list_flatten(lists), column))
    return codes, names, group


def _positive(groups: pa.Table) -> np.ndarray:
    """Mask of the candidates of rank 0."""
    return pc.struct_field(pc.list_flatten(groups["candidates"]), "rank").to_numpy() == 0


def _comparisons(groups: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of positive and negative, and the group's row, of every comparison."""
    codes, _, group = _candidates(groups, "trajectory_id")
    first = _positive(groups)
    best = np.zeros(len(groups), np.int64)
    best[group[first]] = codes[first]
    return best[group[~first]], codes[~first], group[~first]
