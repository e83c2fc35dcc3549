"""The ledger of an ingest: every input row is out, excluded or quarantined, each with its reason.

Which rows are bad is decided where they are read; this room only keeps the account.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import schemas

EXCERPT = 200  # characters of a bad row that are kept


@dataclass(frozen=True)
class Batch:
    """The rows of one input file that are good so far; `row` and `source` are among the columns."""

    label: str  # trajectories, prompts, preferences or ranked_triples
    file: str  # as the quarantine names it
    table: pa.Table


class Ledger:
    """Counts by source, and the quarantined rows."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str, str]] = Counter()
        self._bad: list[dict[str, Any]] = []

    def count(self, what: str, label: str, sources: str | Iterable[str], reason: str = "") -> None:
        """Count rows as `in`, `out` or `excluded`: one of a named source, or one for each value."""
        for source in (sources,) if isinstance(sources, str) else sources:
            self._counts[source, what, label, reason] += 1

    def count_rows(self, what: str, batch: Batch) -> None:
        """Count all rows of a batch by their source."""
        for value in pc.value_counts(batch.table["source"]).to_pylist():
            self._counts[value["values"], what, batch.label, ""] += value["counts"]

    def bad(
        self,
        batch: Batch,
        source: str,
        row: int,
        *,
        reason: str,
        field: str,
        problem: str,
        raw: str,
        what: Literal["quarantined", "excluded"] = "quarantined",
    ) -> None:
        """Quarantine one row; `reason` is one word for the counts, `problem` is for the reader.

        `what` is `excluded` for a sound row that is listed because people will ask where it went.
        """
        self._counts[source, what, batch.label, reason] += 1
        self._bad.append(
            {
                "file": batch.file,
                "row": row,
                "field": field or None,
                "problem": problem,
                "excerpt": raw[:EXCERPT],
            }
        )

    def reject(
        self, batch: Batch, mask: np.ndarray, *, reason: str, field: str, problem: str
    ) -> Batch:
        """Quarantine the rows where `mask` (n,) is true; `problem` may name columns as {column}."""
        if not mask.any():
            return batch
        for row in batch.table.filter(pa.array(mask)).to_pylist():
            self.bad(
                batch,
                row["source"],
                row["row"],
                reason=reason,
                field=field,
                problem=problem.format_map(row),
                raw=excerpt(row),
            )
        return Batch(batch.label, batch.file, batch.table.filter(pa.array(~mask)))

    def one_of(self, batch: Batch, column: str, allowed: tuple[str, ...]) -> Batch:
        """Quarantine the rows whose value in `column` is none of those allowed, and not null."""
        values = batch.table[column].cast(pa.string())
        good = pc.is_in(values, pa.array([*allowed, None], pa.string()))
        return self.reject(
            batch,
            ~good.to_numpy(),
            reason="wrong_value",
            field=column,
            problem=f"{column} is {{{column}!r}}, expected one of: {', '.join(allowed)}",
        )

    def problems(self, most: int = 3) -> str:
        """The first bad rows in words."""
        return "\n".join(
            f"{bad['file']}, row {bad['row']}: {bad['problem']}" for bad in self._bad[:most]
        )

    def check(self) -> None:
        """Hold every account to in = out + excluded + quarantined.

        Raises:
            RuntimeError: rows were lost or made up: a fault of this program, not of the input.
        """
        balance: Counter[tuple[str, str]] = Counter()
        for (source, what, label, _), rows in self._counts.items():
            balance[source, label] += rows if what == "in" else -rows
        wrong = {key: rows for key, rows in balance.items() if rows}
        if wrong:
            msg = f"ingest lost or made up rows: {wrong}"
            raise RuntimeError(msg)

    def counts(self) -> pa.Table:
        """The `counts` rows of stage `ingest`."""
        return pa.Table.from_pylist(
            [
                {
                    "source": source,
                    "stage": "ingest",
                    "what": what,
                    "label": label,
                    "reason": reason,
                    "split": "",
                    "rows": rows,
                }
                for (source, what, label, reason), rows in sorted(self._counts.items())
            ],
            schema=schemas.COUNTS.schema,
        )

    def quarantine(self, now: datetime) -> pa.Table:
        """The `quarantine` rows."""
        return pa.Table.from_pylist(
            [{**row, "created_at": now} for row in self._bad], schema=schemas.QUARANTINE.schema
        )


def excerpt(row: Mapping[str, Any]) -> str:
    """A row as JSON, short, without what it lacks."""
    shown = {
        key: value[:EXCERPT] if isinstance(value, str) else value
        for key, value in row.items()
        if value is not None and key != "row"
    }
    return json.dumps(shown, ensure_ascii=False, default=str)[:EXCERPT]
