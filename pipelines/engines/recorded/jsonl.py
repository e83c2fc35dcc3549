"""JSONL files of recorded trajectories as Arrow: every bad line is set apart with its number."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.engines.recorded.columns import COLUMNS, NAMES, WORDS, Column, with_source
from pipelines.engines.recorded.ledger import Batch, Ledger
from pipelines.schemas import BOOL, LONG, MESSAGES, REAL, TEXT

Progress = Callable[[int, int, str], None]
LINES = 8192  # made into Arrow at a time
LARGEST = float(np.finfo(np.float32).max)  # of `REAL`


class BadLine(ValueError):
    """A line that cannot be a row: what is wrong, in one word for the counts, and where."""

    def __init__(self, problem: str, reason: str, field: str = "", source: object = None):
        super().__init__(problem)
        self.reason, self.field = reason, field
        self.source = source if isinstance(source, str) and encodable(source) else None


def read_jsonl(
    path: Path, batch: Batch, source: str, ledger: Ledger, progress: Progress | None
) -> Batch:
    """Read a file into the (empty) `batch`; `source` is for rows that name none."""
    columns = COLUMNS[batch.label]
    tables = [batch.table]
    rows: list[dict[str, Any]] = []
    size, done = path.stat().st_size, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            done += len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                rows.append({**_parse(line, columns), "row": number})
            except BadLine as bad:
                whose = bad.source or source
                ledger.count("in", batch.label, whose)
                ledger.bad(
                    batch,
                    whose,
                    number,
                    reason=bad.reason,
                    field=bad.field,
                    problem=str(bad),
                    raw=line.decode(errors="replace").strip(),
                )
            if len(rows) == LINES:
                tables.append(_table(rows, columns))
                rows = []
                if progress:
                    progress(done, size, f"reading {batch.file}")
    tables.append(_table(rows, columns))
    table = with_source(pa.concat_tables(tables).unify_dictionaries(), source)
    batch = Batch(batch.label, batch.file, table)
    ledger.count_rows("in", batch)
    return batch


def _table(rows: list[dict[str, Any]], columns: tuple[Column, ...]) -> pa.Table:
    arrays = []
    for column in columns:
        values = pa.array([row[column.name] for row in rows], _plain(column.arrow))
        arrays.append(values.dictionary_encode() if column.arrow == WORDS else values)
    arrays.append(pa.array([row["row"] for row in rows], LONG))
    return pa.Table.from_arrays(arrays, names=[*(column.name for column in columns), "row"])


def _plain(arrow: pa.DataType) -> pa.DataType:
    return TEXT if arrow == WORDS else arrow


def parse_line(line: bytes) -> Any:
    """What a line of JSON says.

    Raises:
        BadLine: it is not UTF-8, or not JSON.
    """
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        msg = f"not valid UTF-8 at byte {error.start + 1} of the line; write it again in UTF-8"
        raise BadLine(msg, "not_utf8") from error
    except (ValueError, RecursionError) as error:
        msg = f"not valid JSON: {error}; one object a line is expected"
        raise BadLine(msg, "not_json") from error


def _parse(line: bytes, columns: tuple[Column, ...]) -> dict[str, Any]:
    row = parse_line(line)
    if not isinstance(row, dict):
        msg = f"a JSON {type(row).__name__}; one object a line is expected"
        raise BadLine(msg, "not_json")
    found = {}
    for column in columns:
        value = row.get(column.name)
        if value is None:
            if column.required:
                absent = column.name not in row
                problem = f"{column.name} is {'missing' if absent else 'null'}"
                reason = "missing" if absent else "null"
                raise BadLine(problem, reason, column.name, row.get("source"))
        elif (value := _value(value, column)) is None:
            problem = f"{column.name} is {row[column.name]!r:.80}, expected {NAMES[column.type]}"
            raise BadLine(problem, "wrong_type", column.name, row.get("source"))
        elif isinstance(value, str) and not encodable(value):
            problem = f"{column.name} holds half a surrogate pair, which is no character"
            raise BadLine(problem, "not_utf8", column.name)
        found[column.name] = value
    return found


def _value(value: Any, column: Column) -> Any:
    """A JSON value as the column's type; None where it cannot be meant."""
    kind = type(value)
    if column.type == MESSAGES:
        return value if kind is str else json.dumps(value) if kind is list else None
    if column.type == TEXT:
        return value if kind is str else str(value) if kind is int and not column.prose else None
    if column.type == BOOL:
        return value if kind is bool else None
    if column.type == REAL:
        return _real(value) if kind in (int, float) else None
    bits = column.type.bit_width - 1
    whole = kind is int or (kind is float and value.is_integer())
    return int(value) if whole and -(2**bits) <= value < 2**bits else None


def _real(value: float) -> float | None:
    """A number as a float; None where a column of the lake cannot hold it."""
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) <= LARGEST else None


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold a text: half a surrogate pair is no character."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
