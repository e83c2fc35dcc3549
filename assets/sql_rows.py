"""How `polar sql` writes rows: a table for eyes; CSV, JSON and Parquet for programs.

Each writer takes a connection on which a query was just executed, and streams. What may be asked
is in `sql.py`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from datetime import date, time
from typing import Any, TextIO

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.attach import plain

SHOWN_ROWS = 100
SHOWN_CHARACTERS = 160
_BATCH = 10_000


def _names(con: duckdb.DuckDBPyConnection) -> list[str]:
    return _distinct([column[0] for column in con.description or []])


def _rows(con: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
    while batch := con.fetchmany(_BATCH):
        yield from batch


def _distinct(names: list[str]) -> list[str]:
    """Column names with a number where one is there before: id, id_1."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        number = seen.get(name, 0)
        seen[name] = number + 1
        result.append(f"{name}_{number}" if number else name)
    return result


def _write_table(con: duckdb.DuckDBPyConnection, stream: TextIO) -> None:
    """At most `SHOWN_ROWS` rows; one column a line where the terminal is too narrow for a table."""
    names, rows = _names(con), _rows(con)
    if names == ["explain_key", "explain_value"]:
        stream.writelines(f"{plan}\n" for _, plan in rows)
        return
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 10_000)
    shown = [row for _, row in zip(range(SHOWN_ROWS + 1), rows, strict=False)]
    cut, shown = len(shown) > SHOWN_ROWS, shown[:SHOWN_ROWS]
    table = Table()
    for at, name in enumerate(names):
        numbers = any(isinstance(row[at], int | float) for row in shown)
        table.add_column(Text(name), justify="right" if numbers else "left", no_wrap=True)
    for row in shown:
        table.add_row(*map(_cell, row))
    unlimited = console.options.update(max_width=1_000_000)
    if console.measure(table, options=unlimited).maximum <= console.width:
        console.print(table)
    else:
        width = max(map(len, names))
        for number, row in enumerate(shown, start=1):
            console.rule(f"row {number}", align="left")
            for name, value in zip(names, row, strict=True):
                console.print(Text(f"{name:<{width}}  ") + _cell(value))
    if cut:
        console.print(f"the first {SHOWN_ROWS} rows; --format csv or json gives all of them")


def _cell(value: Any) -> Text:
    if value is None:
        return Text("null", style="dim")
    text = _written(value)
    if len(text) > SHOWN_CHARACTERS:
        text = text[: SHOWN_CHARACTERS - 1] + "…"
    # What a policy wrote must not steer the terminal, and a row is a line.
    return Text(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )


def _write_csv(con: duckdb.DuckDBPyConnection, stream: TextIO) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_names(con))
    for row in _rows(con):
        writer.writerow(["" if value is None else _written(value) for value in row])


def _write_json(con: duckdb.DuckDBPyConnection, stream: TextIO) -> None:
    """An array of objects, one a line."""
    names, separator = _names(con), "["
    for row in _rows(con):
        stream.write(separator + "\n" + _json(dict(zip(names, row, strict=True))))
        separator = ","
    stream.write("[]\n" if separator == "[" else "\n]\n")


def _write_parquet(con: duckdb.DuckDBPyConnection, stream: TextIO) -> None:
    reader = con.to_arrow_reader(_BATCH)
    names = _distinct(reader.schema.names)
    empty = plain(pa.Table.from_batches([], reader.schema)).rename_columns(names)
    with pq.ParquetWriter(stream.buffer, empty.schema, compression="zstd") as writer:
        for batch in reader:
            rows = plain(pa.Table.from_batches([batch])).rename_columns(names)
            writer.write_table(rows.cast(empty.schema))


def _written(value: Any) -> str:
    """A value as text; lists and structs as JSON."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict):
        return _json(value)
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def _json(value: Any) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, default=_other)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null, as DuckDB writes them."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def _other(value: Any) -> str:
    return value.isoformat() if isinstance(value, date | time) else _written(value)


WRITERS: dict[str, Callable[[duckdb.DuckDBPyConnection, TextIO], None]] = {
    "table": _write_table,
    "csv": _write_csv,
    "json": _write_json,
    "parquet": _write_parquet,
}
