"""Writes `docs/lake.md` from schemas, views and queries: `python -m pipelines.lake_docs`.

A test holds the page and the code together. What the tables mean is said in `schemas.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.ddl import sql_type
from pipelines.queries import QUERIES
from pipelines.schemas import TABLES, Table
from pipelines.views import VIEWS, View

PAGE = Path(__file__).parents[1] / "docs" / "lake.md"

SHELL = """\
install ducklake;
install sqlite;
attach 'ducklake:sqlite:var/lake/catalog.sqlite' as lake
    (data_path 'var/lake/data/', override_data_path true, read_only);
use lake;
from pool_overview;
"""

PYTHON = """\
import duckdb
from duckdb_extensions import import_extension

con = duckdb.connect()
for name in ("ducklake", "sqlite_scanner"):
    import_extension(name, con=con)  # from the installed package, nothing is downloaded
    con.load_extension(name)
con.execute(\"\"\"
    attach 'ducklake:sqlite:var/lake/catalog.sqlite' as lake
        (data_path 'var/lake/data/', override_data_path true, read_only)
\"\"\")
con.execute("use lake")
print(con.sql("from pool_overview"))
"""

_HEAD = """\
# The lake

This page is generated from `pipelines/schemas.py`, `pipelines/views.py` and `pipelines/queries.py`
by `python -m pipelines.lake_docs`; do not edit it.

The lake is a [DuckLake](https://ducklake.select): Parquet files under `$POLAR_HOME/lake/data/` and
a SQLite catalogue, `$POLAR_HOME/lake/catalog.sqlite`, that says which of them make up each table at
each snapshot. `POLAR_HOME` is `var` in this repository unless you set it. Every publish is one
transaction and makes one snapshot with author and message. The folder can be moved or copied as a
whole, while nothing writes to it.

## Asking

`polar sql "from pool_overview"` prints a table; `--format csv`, `json` or `parquet` writes all rows
for programs, `--output FILE` into a file, and a bare `polar sql` opens a prompt with history. It
only reads, and it works while a run is writing.

From the plain DuckDB shell (1.5; the first two lines need the network, once):

```sql
{shell}```

Views answer as `lake.pool_overview` too, and under any other name than `lake`: their tables are
found beside them. `override_data_path` makes a moved lake readable; without `read_only` the shell
can write as well, and a run would then have to wait for it.

From Python without a network, in this project's environment; afterwards `load ducklake;` and
`load sqlite_scanner;` work in a DuckDB shell of the same version too:

```python
{python}```

In Python within this project:

```python
from pathlib import Path
from pipelines.lake import Lake

with Lake.open(Path("var"), read_only=True) as lake:
    table = lake.query("from pool_overview")  # an Arrow table
```

## Snapshots

`from lake.snapshots()` lists them. `polar sql --snapshot 7 "from pair_balance"` shows everything,
views included, as it was after publish 7; `select count(*) from pairs at (version => 7)` does so
for one table of a query. A training run and an evaluation record the snapshot that they read.
`pipelines.maintenance.maintain` merges small files and removes those that no snapshot needs. The
weekly refresh and the asset `maintenance` also let snapshots go that are older than
`lake.keep_days`, but none that a checkpoint, an evaluation or a group names. `polar diff 12 34`
compares two.

## Ids

Ids are 128-bit hashes of what a thing is made of, type UUID: making it again gives the same id.
Text is stored once, in `trajectories`; other tables name it by id.
"""


def page() -> str:
    """The page as it should be."""
    parts = [_HEAD.format(shell=SHELL, python=PYTHON), "\n## Ten queries\n"]
    for number, query in enumerate(QUERIES, start=1):
        parts.append(f"\n{number}. {query.question}\n\n```sql\n{query.sql.strip()}\n```\n")
    parts.append("\n## Tables\n")
    parts += [_table(table) for table in TABLES.values()]
    parts.append("\n## Views\n")
    parts += [_view(view) for view in VIEWS.values()]
    return "".join(parts)


def _table(table: Table) -> str:
    rows = [
        (f"`{c.name}`", f"`{sql_type(c.type)}`", "yes" if c.nullable else "", c.meaning)
        for c in table.columns
    ]
    key = ", ".join(f"`{name}`" for name in table.key)
    order = ", ".join(f"`{name}`" for name in table.order)
    return (
        f"\n### {table.name}\n\n{table.meaning} Key: {key}. Files sorted by: {order}.\n\n"
        + _rows(("column", "type", "may be null", "meaning"), rows)
    )


def _view(view: View) -> str:
    rows = [(f"`{name}`", meaning) for name, meaning in view.columns.items()]
    return f"\n### {view.name}\n\n{view.meaning}\n\n" + _rows(("column", "meaning"), rows)


def _rows(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
