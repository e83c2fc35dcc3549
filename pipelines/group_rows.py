"""Rows of `groups` and of its counts, for policy groups and preference groups alike.

How groups come about is in `groups` and `preference_groups`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines import ids, schemas
from pipelines.beam import check_counts

CountKey = tuple[str, str, str, str, str]  # source, what, label, reason, split


@dataclass(frozen=True, kw_only=True)
class GroupRows:
    """Columns of n groups with m candidates in all; ids are raw (fixed-size binary) arrays."""

    prompt_id: pa.Array  # n
    reference: pa.Array  # n
    size: np.ndarray  # n, candidates of each group
    candidate: pa.Array  # m trajectory ids, group by group, best first
    rank: np.ndarray  # m
    policy_id: pa.Array  # m
    relation: Sequence[str]  # m
    category: pa.Array  # n
    split: Sequence[str]  # n
    cell: Sequence[str]  # n

    def table(self, wrapper: str, snapshot: int) -> pa.Table:
        """The groups with the columns of schemas.GROUPS."""
        n = len(self.reference)
        offsets = np.concatenate([[0], np.cumsum(self.size)]).astype(np.int32)
        candidates = pa.StructArray.from_arrays(
            [
                _uuids(self.candidate),
                pa.array(self.rank, pa.int32()),
                _uuids(self.policy_id),
                pa.array(self.relation, pa.string()),
            ],
            fields=list(schemas.CANDIDATES.value_type),
        )
        columns = {
            "group_id": ids.array(self._ids(wrapper, offsets)),
            "prompt_id": _uuids(self.prompt_id),
            "reference": _uuids(self.reference),
            "candidates": pa.ListArray.from_arrays(
                pa.array(offsets), candidates, type=schemas.CANDIDATES
            ),
            "wrapper": pa.array([wrapper] * n, pa.string()),
            "category": self.category,
            "split": pa.array(self.split, pa.string()),
            "cell": pa.array(self.cell, pa.string()),
            "snapshot": pa.array([snapshot] * n, pa.int64()),
        }
        return pa.table(columns, schema=schemas.GROUPS.schema)

    def _ids(self, wrapper: str, offsets: np.ndarray) -> list[bytes]:
        candidates = self.candidate.to_pylist()
        return [
            ids.content_id("group", wrapper, reference, *candidates[start:end])
            for reference, start, end in zip(
                self.reference.to_pylist(), offsets[:-1], offsets[1:], strict=True
            )
        ]


def _uuids(raw: pa.Array) -> pa.Array:
    return pa.ExtensionArray.from_storage(schemas.UUID, raw)


def split_name(split: str, cell: str) -> str:
    """How counts name where a group goes: train, or its evaluation cell."""
    return "train" if split == "train" else cell


def counts_table(counts: Counter[CountKey]) -> pa.Table:
    """Rows for schemas.COUNTS.

    Raises:
        CountMismatchError: for some label, what came in differs from what is out and excluded.
    """
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    rows = []
    for (source, what, label, reason, split), number in sorted(counts.items()):
        if number:
            sums[label][what] += number
            values = (source, "groups", what, label, reason, split, number)
            rows.append(dict(zip(schemas.COUNTS.schema.names, values, strict=True)))
    for label, totals in sums.items():
        check_counts(f"groups ({label})", totals, "in", ("out", "excluded"))
    return pa.Table.from_pylist(rows, schema=schemas.COUNTS.schema)
