"""The lake's DDL, derived from `schemas.py` and `views.py`: what a lake lacks, as SQL statements.

Some can only be said once others are committed: they are what the lake lacks next.

Nothing here runs on its own; `lake.py` runs the statements in one transaction.
"""

from __future__ import annotations

import duckdb
import pyarrow as pa

from pipelines.attach import plain, quoted
from pipelines.errors import LakeError
from pipelines.schemas import TABLES, Column, Table
from pipelines.sums import SUMS
from pipelines.views import VIEWS

_TYPES = {
    pa.uuid(): "uuid",
    pa.string(): "varchar",
    pa.int32(): "integer",
    pa.int64(): "bigint",
    pa.float32(): "float",
    pa.float64(): "double",
    pa.bool_(): "boolean",
    pa.timestamp("us", tz="UTC"): "timestamptz",
}

# A query skips files by their keys, and checks each row group of the rest: 512 MB, the default, is
# many of them.
FILE_SIZE = "64MB"


def sql_type(kind: pa.DataType) -> str:
    """The DuckDB type of an Arrow type that the schemas use."""
    if pa.types.is_list(kind):
        return sql_type(kind.value_type) + "[]"
    if pa.types.is_struct(kind):
        return "struct(" + ", ".join(f'"{f.name}" {sql_type(f.type)}' for f in kind) + ")"
    return _TYPES[kind]


def missing(con: duckdb.DuckDBPyConnection) -> list[str]:
    """Statements that bring the attached lake to the present schemas and views; often none.

    Raises:
        LakeError: a table differs in a way that cannot be mended without losing rows; all named.
    """
    found = "select {0}_name, comment from duckdb_{0}s() where database_name = 'lake'"
    present = dict(con.execute(found.format("table")).fetchall())
    comments = dict(con.execute(found.format("view")).fetchall())
    statements: list[str] = []
    if not present:
        statements += [  # rows in files, not in the catalogue; kept for every later writer
            "call lake.set_option('data_inlining_row_limit', 0)",
            "call lake.set_option('parquet_compression', 'zstd')",
            f"call lake.set_option('target_file_size', '{FILE_SIZE}')",
        ]
    sizes = _row_groups(con)
    faults: list[str] = []
    for table in TABLES.values():
        if table.name not in present:
            statements += _create(table)
            continue
        if table.row_group != sizes.get(table.name):  # a table must be there to have options
            statements.append(
                f"call lake.set_option('parquet_row_group_size', {table.row_group}, "
                f"table_name => '{table.name}')"
            )
        columns = plain(con.execute(f'from "{table.name}" limit 0').to_arrow_table()).schema
        for column in table.columns:
            at = columns.get_field_index(column.name)
            if at < 0 and column.nullable:
                statements.append(f'alter table "{table.name}" add column {_column(column)}')
            elif at < 0:
                faults.append(f"{table.name}.{column.name} is not in the lake")
            elif columns.field(at).type != column.type:
                faults.append(
                    f"{table.name}.{column.name} is {columns.field(at).type} in the lake, "
                    f"must be {column.type}"
                )
    if faults:
        msg = (
            "the lake was made by another version of this project: " + "; ".join(faults) + ". "
            "Use that version, or begin a new lake under another POLAR_HOME"
        )
        raise LakeError(msg)
    if present:  # a lake from before a table of sums has rows to sum
        absent = [sums for name, sums in SUMS.items() if name not in present]
        statements += [sql for sums in absent for sql in sums.updates]
    for view in VIEWS.values():
        if comments.get(view.name) != view.comment:
            statements.append(f'create or replace view "{view.name}" as {view.sql}')
            statements.append(f'comment on view "{view.name}" is {quoted(view.comment)}')
    return statements


def _row_groups(con: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Rows in a row group, for the tables that have a size of their own."""
    found = con.execute(
        "select scope_entry, value from lake.options() "
        "where option_name = 'parquet_row_group_size' and scope = 'TABLE'"
    )
    return {entry.removeprefix("main."): int(value) for entry, value in found.fetchall()}


def _create(table: Table) -> list[str]:
    columns = ", ".join(
        _column(column) + ("" if column.nullable else " not null") for column in table.columns
    )
    statements = [
        f'create table "{table.name}" ({columns})',
        f'comment on table "{table.name}" is {quoted(table.meaning)}',
    ]
    statements += [
        f'comment on column "{table.name}"."{column.name}" is {quoted(column.meaning)}'
        for column in table.columns
    ]
    if table.order:  # DuckLake then sorts each file it writes or merges
        order = ", ".join(f'"{name}"' for name in table.order)
        statements.append(f'alter table "{table.name}" set sorted by ({order})')
    return statements


def _column(column: Column) -> str:
    return f'"{column.name}" {sql_type(column.type)}'
