"""The lake: DuckLake over Parquet. Publish in one transaction, read any snapshot.

Tables are in `schemas.py`, views in `views.py`, their DDL in `ddl.py`, connections in `attach.py`,
waiting for other processes in `locks.py`; `maintenance.py` keeps the lake small. Nothing else
writes to it.

    with Lake.open(Path("var")) as lake:
        lake.publish("pairs", "new prompts", [Replace("pairs", [Path("pairs.parquet")], "true")])
        lake.query("select label, count(*) as pairs from pairs group by label")
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import ddl, locks, sums
from pipelines.attach import (
    CATALOG,
    DATA,
    connect,
    contended,
    fault,
    interruptible,
    locked,
    plain,
    quoted,
    use,
)
from pipelines.errors import LakeError, QueryError
from pipelines.schemas import TABLES, Table

Data: TypeAlias = pa.Table | Sequence[Path]


@dataclass(frozen=True)
class Append:
    """Insert rows. `data`: an Arrow table, or Parquet files, which are streamed."""

    table: str
    data: Data


@dataclass(frozen=True)
class Replace:
    """Delete the rows for which the SQL predicate `where` holds, then insert `data`."""

    table: str
    data: Data
    where: str


@dataclass(frozen=True)
class Upsert:
    """Delete the rows whose key is in `data`, then insert `data`."""

    table: str
    data: Data


Change = Append | Replace | Upsert


class Lake:
    """An open lake, for one thread at a time; `Lake.open` makes it and `with` closes it."""

    def __init__(
        self, home: Path, *, read_only: bool, threads: int, memory_limit: str, patience: float
    ):
        self.home = home
        self.read_only = read_only
        self._patience = patience
        self._con = connect(home, read_only=read_only, threads=threads, memory_limit=memory_limit)

    @classmethod
    def open(
        cls,
        home: Path,
        *,
        read_only: bool = False,
        threads: int = 2,
        memory_limit: str = "2GB",
        patience: float = 60.0,
    ) -> Lake:
        """Attach the lake under `home`; unless `read_only`, create what it lacks.

        `patience` is how many seconds a publish waits for other writers.

        Raises:
            LakeError: no lake (read-only), a lake of another version, or locked for too long.
        """
        home = home.absolute()
        if not read_only:
            try:
                (home / DATA).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                msg = f"cannot make a lake under {home}: {error}; name another POLAR_HOME"
                raise LakeError(msg) from error
        # Two processes may meet in an empty folder, so that opening to write is a turn as well.
        with nullcontext() if read_only else _turn(home, patience):
            lake = cls(
                home,
                read_only=read_only,
                threads=threads,
                memory_limit=memory_limit,
                patience=patience,
            )
            try:
                while not read_only and (statements := ddl.missing(lake._con)):
                    lake.commit("lake", "create tables and views", statements)
            except BaseException:
                lake.close()
                raise
        return lake

    def __enter__(self) -> Lake:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach; the lake stays as last published."""
        self._con.close()

    def publish(self, author: str, message: str, changes: Sequence[Change]) -> int:
        """Apply `changes` in one transaction, in order: all of them or none.

        Waits and tries again while others write, for as long as the lake's patience. Changes that
        touch no row make no snapshot.

        Returns:
            The id of the snapshot that shows them.

        Raises:
            LakeError: wrong columns or a missing value, a lock held for too long, a full disk. The
                last snapshot is intact whatever happens.
        """
        if self.read_only:
            msg = f"cannot publish {message!r}: the lake at {self.home} was opened read-only"
            raise LakeError(msg)
        statements: list[str] = []
        rows: dict[str, pa.Table] = {}
        for number, change in enumerate(changes):
            _check(change)
            if isinstance(change.data, pa.Table):
                source = f"incoming_{number}"
                rows[source] = change.data
            else:
                source = _files(change.data)
            statements += _statements(change, source)
        statements += sums.updates({change.table for change in changes})
        try:
            with self.turn(), _named(self._con, rows):
                self.commit(author, message, statements)
                return self.snapshot()
        except duckdb.Error as error:  # naming the rows asks the catalogue, too
            raise fault(error, self.home, f"publish {message!r}") from error

    def query(
        self,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        snapshot: int | None = None,
        tables: Mapping[str, pa.Table] | None = None,
    ) -> pa.Table:
        """The result of one query. Ids come back as `pa.uuid()`; as parameters they are text.

        `snapshot` answers as of then, views included, for table names without a catalogue;
        `tables` are Arrow tables to ask as well.

        Raises:
            QueryError: the query is wrong.
            LakeError: there is no such snapshot, or the lake cannot be read.
        """
        with self._reading(snapshot) as con, _named(con, tables or {}):
            return plain(con.execute(sql, params).to_arrow_table())

    def copy(self, sql: str, path: Path, *, snapshot: int | None = None) -> int:
        """Stream a query's result into a Parquet file, which appears when it is complete.

        Returns:
            Rows written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with self._reading(snapshot) as con:
                to = f"to {quoted(str(part))} (format parquet, compression zstd)"
                ((rows,),) = con.execute(f"copy ({sql}) {to}").fetchall()
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return rows

    def snapshot(self) -> int:
        """The id of the newest snapshot."""
        return self.query("from lake.current_snapshot()")[0][0].as_py()

    def row_counts(self) -> dict[str, int]:
        """Rows of every table."""
        counts = " union all ".join(f"select '{t}' as t, count(*) as n from {t}" for t in TABLES)
        found = {row["t"]: row["n"] for row in self.query(counts).to_pylist()}
        return {name: found[name] for name in TABLES}

    def duplicate_keys(self, table: str, limit: int = 1000) -> pa.Table:
        """Keys that occur more than once with their `rows`, most frequent first."""
        key = ", ".join(TABLES[table].key)
        return self.query(
            f"select {key}, count(*) as rows from {table} group by {key} having count(*) > 1 "
            f"order by rows desc, {key} limit {limit}"
        )

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Our turn to write: others of our processes wait meanwhile, and we for them.

        Raises:
            LakeError: others wrote for longer than the lake's patience.
        """
        with _turn(self.home, self._patience):
            yield

    def commit(self, author: str, message: str, statements: Sequence[str]) -> None:
        """Run `statements` in one transaction; again, with back-off, while others lock the lake.

        For rows there is `publish`; this is for what else changes the lake, in a `turn`.

        Raises:
            LakeError: a statement fails, or others lock the lake for too long.
        """
        deadline = time.monotonic() + self._patience
        for delay in locks.delays():
            try:
                with interruptible(self._con):
                    self._con.execute("begin")
                    self._con.execute("call lake.set_commit_message(?, ?)", [author, message])
                    for statement in statements:
                        self._con.execute(statement).fetchall()
                    self._con.execute("commit")
                    return
            except duckdb.Error as error:
                if not contended(error) or time.monotonic() + delay > deadline:
                    raise fault(error, self.home, f"publish {message!r}") from error
            finally:
                with suppress(duckdb.Error):  # after a commit, good or bad, none is open
                    self._con.execute("rollback")
            time.sleep(delay)

    @contextmanager
    def _reading(self, snapshot: int | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection that shows `snapshot`; the faults of what runs on it, in words."""
        try:
            with interruptible(self._con):
                if snapshot is None:
                    yield self._con
                    return
                name = f"at_{int(snapshot)}"
                with self._con.cursor() as con:
                    use(con, self.home, name, read_only=True, snapshot=snapshot)
                    try:
                        with interruptible(con):
                            yield con
                    finally:
                        con.execute("use memory")
                        con.execute(f"detach {name}")
        except duckdb.Error as error:
            raise fault(error, self.home, "run the query", QueryError) from error


@contextmanager
def _turn(home: Path, patience: float) -> Iterator[None]:
    """Our turn to write: one of our processes at a time, the others queue."""
    path = home / CATALOG.with_name("publish.lock")
    try:
        with locks.exclusive(path, patience):
            yield
    except locks.WaitedTooLongError:
        raise locked(home, path) from None


@contextmanager
def _named(con: duckdb.DuckDBPyConnection, tables: Mapping[str, pa.Table]) -> Iterator[None]:
    """Arrow tables under names that queries on `con` can use."""
    for name, table in tables.items():
        con.register(name, table)
    try:
        yield
    finally:
        for name in tables:
            con.unregister(name)


def _check(change: Change) -> None:
    """Raise a LakeError that names every column which is not as `schemas.py` says."""
    table = TABLES.get(change.table)
    if table is None:
        msg = f"the lake has no table {change.table!r}; it has {', '.join(TABLES)}"
        raise LakeError(msg)
    if kept := sums.SUMS.get(table.name):
        of = ", ".join(sorted(kept.of))
        msg = f"{table.name} is summed by publish itself; publish what it sums: {of}"
        raise LakeError(msg)
    if isinstance(change.data, pa.Table):
        given = {"the rows": change.data.schema}
    else:
        given = {str(path): pq.read_schema(path) for path in change.data}
    for what, schema in given.items():
        if faults := _faults(table, schema):
            msg = f"cannot publish {what} to {table.name}: {'; '.join(faults)}"
            raise LakeError(msg)


def _faults(table: Table, given: pa.Schema) -> list[str]:
    faults = []
    for field in table.schema:
        at = given.get_field_index(field.name)
        if at < 0:
            faults.append(f"column {field.name} is missing, or there twice")
        elif given.field(at).type != field.type:
            faults.append(f"column {field.name} is {given.field(at).type}, must be {field.type}")
    unknown = sorted(set(given.names) - set(table.schema.names))
    return faults + [f"column {name} is unknown" for name in unknown]


def _files(paths: Sequence[Path]) -> str:
    """The SQL source that streams Parquet files; wildcards in their names are only characters."""
    names = (re.sub(r"([*?[])", r"[\1]", str(path)) for path in paths)
    return f"read_parquet([{', '.join(map(quoted, names))}])"


def _statements(change: Change, source: str) -> list[str]:
    """The SQL of one change whose rows `source` gives."""
    table = TABLES[change.table]
    statements = []
    if isinstance(change, Replace):
        statements.append(f"delete from {table.name} where {change.where}")
    if not len(change.data):
        return statements
    if isinstance(change, Upsert):
        match = " and ".join(f"new.{key} = {table.name}.{key}" for key in table.key)
        statements.append(
            f"delete from {table.name} where exists (select 1 from {source} as new where {match})"
        )
    columns = ", ".join(f'"{name}"' for name in table.schema.names)
    statements.append(f"insert into {table.name} ({columns}) select {columns} from {source}")
    return statements
