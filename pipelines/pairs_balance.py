"""What the kept pairs add up to: sums by the two policies, shares of labels, rulers, the balance.

Pairs are only read here, never chosen: which are kept is a matter of `budget` and `pairs`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather as feather

from pipelines import ids, schemas
from pipelines.labels import AMBIGUOUS, LABELS, REASONS, RELATIONS, Answers, sql_list

if TYPE_CHECKING:
    from pipelines.pairs import Judged

UNIT = 2.0**24  # means are sums of whole units: the same in whatever order they are added
KEY = schemas.PAIR_SUMS.key
BY = ("source", "policy_a", "policy_b", "split", "cell", "label", "reason", "relation")
TOTALS = ("pairs", "similarity", "length_ratio")
AT_ONCE = 64  # files of sums that are added in one go

# What `pair_rulers` reads: how often each value of a ruler stands beside each label.
RULERS_SQL = """
with labelled as (
    select split, label, round(similarity, 4) as similarity, round(length_ratio, 4) as length_ratio
    from pairs
    where label <> 'ambiguous' and prompt_id in (
        select prompt_id from prompts where source in ({sources})
    )
)
{rulers}
"""
_RULER_SQL = """
select split, '{ruler}' as ruler, {ruler}::double as value,
       count(*) filter (label = 'same_policy') as same,
       count(*) filter (label = 'cross_policy') as other
from labelled group by split, {ruler}
"""
RULERS = ("length_ratio", "similarity")


def sum_pairs(x: Answers, j: Judged, kept: np.ndarray, similarity: np.ndarray) -> pa.Table:
    """Sums of a chunk's kept pairs, `BY` what; similarity and length ratio in `UNIT`s, int64."""
    a, b = j.a[kept], j.b[kept]
    names, policy = _ranked(x.policy_id)
    one, other = np.minimum(policy[a], policy[b]), np.maximum(policy[a], policy[b])
    labels = (j.labelled.label[kept], j.labelled.reason[kept], j.labelled.relation[kept])
    fields = (x.source[a], x.cell[a], *labels)
    shape = (len(x.sources), len(schemas.CELLS), len(LABELS), len(REASONS), len(RELATIONS))
    kinds, kind = occurring(np.ravel_multi_index(fields, shape), int(np.prod(shape)))
    key = (one * len(names) + other) * max(len(kinds), 1) + kind
    keys, place = occurring(key, len(names) ** 2 * len(kinds))
    couple, kind = np.divmod(keys, max(len(kinds), 1))
    of, cell, label, reason, relation = np.unravel_index(kinds[kind], shape)
    weights = (None, np.rint(similarity * UNIT), np.rint(j.ratio[kept] * UNIT))
    columns = {
        "source": pa.array(x.sources, pa.string()).take(pa.array(of)),
        "policy_a": _policies(names, couple // max(len(names), 1)),
        "policy_b": _policies(names, couple % max(len(names), 1)),
        "split": _words(np.minimum(cell, 1), schemas.SPLITS),
        "cell": _words(cell, schemas.CELLS),
        "label": _words(label, LABELS),
        "reason": _words(reason, REASONS),
        "relation": _words(relation, RELATIONS),
    } | {
        name: np.bincount(place, weight, len(keys)).astype(np.int64)
        for name, weight in zip(TOTALS, weights, strict=True)
    }
    return pa.table(columns)


def _ranked(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The distinct raw ids in ascending order, and each row's place among them, int64."""
    codes, distinct = ids.codes(column)
    order = ids.order(ids.words(distinct))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return distinct.take(pa.array(order)), rank[codes]


def occurring(codes: np.ndarray, space: int) -> tuple[np.ndarray, np.ndarray]:
    """The codes that occur, ascending, and each row's place among them; all are below `space`."""
    if space > 8 * len(codes) + 1024:
        return np.unique(codes, return_inverse=True)
    present = np.bincount(codes, minlength=space) > 0
    return np.flatnonzero(present), (np.cumsum(present) - 1)[codes]


def _policies(names: pa.Array, rows: np.ndarray) -> pa.Array:
    return pa.ExtensionArray.from_storage(schemas.UUID, names.take(pa.array(rows)))


def _words(codes: np.ndarray, names: Sequence[str]) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(codes))


def merge_sums(files: Sequence[Path]) -> pa.Table:
    """Rows of schemas.PAIR_SUMS, sorted by key, from the files that `sum_pairs` gave for chunks."""
    total: pa.Table | None = None
    for at in range(0, len(files), AT_ONCE):
        tables = [_plain(feather.read_table(file)) for file in files[at : at + AT_ONCE]]
        total = _added(pa.concat_tables([*tables, *([] if total is None else [total])]))
    if total is None:
        return schemas.PAIR_SUMS.schema.empty_table()
    total = total.sort_by([(name, "ascending") for name in KEY])
    pairs = total["pairs"].to_numpy()
    columns: dict[str, Any] = {name: total[name] for name in (*BY, "pairs")}
    for name in ("policy_a", "policy_b"):
        columns[name] = pa.ExtensionArray.from_storage(schemas.UUID, total[name].combine_chunks())
    for name in TOTALS[1:]:
        columns[f"mean_{name}"] = total[name].to_numpy() / UNIT / pairs
    names = schemas.PAIR_SUMS.schema.names
    return pa.table({name: columns[name] for name in names}, schema=schemas.PAIR_SUMS.schema)


def _plain(table: pa.Table) -> pa.Table:
    """Ids as raw bytes, which Arrow can group by."""
    for name in ("policy_a", "policy_b"):
        at = table.column_names.index(name)
        table = table.set_column(at, name, ids.storage(table[name]))
    return table


def _added(table: pa.Table) -> pa.Table:
    summed = table.group_by([*BY]).aggregate([(name, "sum") for name in TOTALS])
    return summed.rename_columns([*BY, *TOTALS])


def label_shares(counts: pa.Table) -> pa.Table:
    """Share of same-policy among same and cross pairs, per source and cell and per split.

    Args:
        counts: what `make_pairs` counted.

    Returns:
        source (or `all`), split (a cell, or train or eval), same, cross, share, and `possible`:
        whether there were pairs of both labels to draw from.
    """
    kept: Counter[tuple[str, str, str]] = Counter()
    possible: Counter[tuple[str, str, str]] = Counter()
    for row in counts.filter(pc.is_in(counts["reason"], pa.array(["", "budget"]))).to_pylist():
        source, cell, label = row["source"], row["split"], row["label"]
        if label in LABELS[:AMBIGUOUS] and cell:
            split = schemas.SPLITS[cell != "seen"]
            for where in ((source, cell), ("all", cell), ("all", split)):
                possible[*where, label] += row["rows"]
                kept[*where, label] += row["rows"] if row["what"] == "out" else 0
    rows = []
    for source, split in sorted({key[:2] for key in possible}):
        same, cross = (kept[source, split, label] for label in LABELS[:AMBIGUOUS])
        both = all(possible[source, split, label] for label in LABELS[:AMBIGUOUS])
        share = same / max(same + cross, 1)
        rows.append((source, split, same, cross, share, both))
    names = ("source", "split", "same", "cross", "share", "possible")
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])


def balance(sums: pa.Table) -> pa.Table:
    """What the budget gave: one row a source and cell, from the sums of the pairs that are kept.

    Returns:
        source, cell, pairs; shares same_policy (of labelled pairs), sibling (of cross pairs) and
        ambiguous (per labelled pair); length_ratio_same and length_ratio_cross, means that are
        equal where lengths are matched; couples of different policies, and the pairs of the
        largest and the median one; shares and means are null where there is nothing to share.
    """
    rows = []
    for place in sums.group_by(["source", "cell"]).aggregate([]).sort_by("source").to_pylist():
        inside = (pc.field("source") == place["source"]) & (pc.field("cell") == place["cell"])
        part = sums.filter(inside)
        same = part.filter(pc.field("label") == "same_policy")
        cross = part.filter(pc.field("label") == "cross_policy")
        labelled = _pairs(same) + _pairs(cross)
        couples = ids.storage(cross["policy_a"]), ids.storage(cross["policy_b"])
        by_couple = (
            pa.table({"a": couples[0], "b": couples[1], "pairs": cross["pairs"]})
            .group_by(["a", "b"])
            .aggregate([("pairs", "sum")])["pairs_sum"]
            .to_numpy()
        )
        rows.append(
            place
            | {
                "pairs": _pairs(part),
                "same_policy": _share(_pairs(same), labelled),
                "sibling": _share(
                    _pairs(cross.filter(pc.field("relation") == "sibling")), _pairs(cross)
                ),
                "ambiguous": _share(_pairs(part) - labelled, labelled),
                "length_ratio_same": _mean(same, "mean_length_ratio"),
                "length_ratio_cross": _mean(cross, "mean_length_ratio"),
                "couples": len(by_couple),
                "couple_most": int(by_couple.max(initial=0)),
                "couple_median": float(np.median(by_couple)) if len(by_couple) else None,
            }
        )
    return pa.Table.from_pylist(rows)


def _pairs(sums: pa.Table) -> int:
    return pc.sum(sums["pairs"], min_count=0).as_py()


def _share(some: int, of: int) -> float | None:
    return some / of if of else None


def _mean(sums: pa.Table, name: str) -> float | None:
    if not len(sums):
        return None
    return float(np.average(sums[name].to_numpy(), weights=sums["pairs"].to_numpy()))


def rulers_sql(sources: Sequence[str]) -> str:
    """The lake query whose result `pair_rulers` takes, for the pairs of some sources."""
    rulers = "union all".join(_RULER_SQL.format(ruler=ruler) for ruler in RULERS)
    return RULERS_SQL.format(sources=sql_list(sources), rulers=rulers)


def pair_rulers(values: pa.Table) -> pa.Table:
    """What length and similarity alone tell about the label of a pair, per split.

    Args:
        values: split, ruler, value, and the same-policy (`same`) and cross-policy pairs (`other`)
            that have it, one row a value; what `rulers_sql` asks for.

    Returns:
        split, ruler, auc and n: the chance that a same-policy pair has the larger value than a
        cross-policy one, ties counted one half; 0.5 gives nothing away.
    """
    rows = []
    for split in schemas.SPLITS:
        for ruler in RULERS:
            inside = (pc.field("split") == split) & (pc.field("ruler") == ruler)
            part = values.filter(inside).sort_by("value")
            same, other = (part[name].to_numpy().astype(float) for name in ("same", "other"))
            n, m = same.sum(), other.sum()
            beaten = same * (np.cumsum(other) - other / 2)
            auc = float(beaten.sum() / (n * m)) if n and m else None
            rows.append({"split": split, "ruler": ruler, "auc": auc, "n": int(n + m)})
    return pa.Table.from_pylist(rows)
