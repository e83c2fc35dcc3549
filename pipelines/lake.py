"""The lake: DuckLake over Parquet. Publish in one transaction, read any snapshot, tidy up.

Tables are in `schemas.py`, views in `views.py`, their DDL in `ddl.py`, connections in `attach.py`,
waiting for other processes in `locks.py`. Nothing else writes to the lake.

    with Lake.open(Path("var")) as lake:
        lake.publish("pairs", "new prompts", [Replace("pairs", [Path("pairs.parquet")], "true")])
        lake.query("select label, count(*) as pairs from pairs group by label")
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import ddl, locks
from pipelines.attach import (
    CATALOG,
    DATA,
    SPILL,
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

_EXPENDABLE = """
select snapshot_id from lake.snapshots()
where snapshot_time < ? and snapshot_id < (select max(snapshot_id) from lake.snapshots())
    and snapshot_id not in (
        select snapshot from checkpoints where snapshot is not null
        union all select snapshot from evaluations where snapshot is not null
        union all select snapshot from groups
        union all select snapshot_id from groups -- the publish that shows them
    )
order by snapshot_id
"""


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
                    lake._commit("lake", "create tables and views", statements)
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
        try:
            with _turn(self.home, self._patience), _named(self._con, rows):
                self._commit(author, message, statements)
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

    def maintain(
        self, grace: timedelta = timedelta(hours=1), keep: timedelta | None = None
    ) -> dict[str, int]:
        """Merge small files, rewrite those mostly deleted, remove files that no snapshot needs.

        Without `keep` every snapshot stays readable. With it, those older than that are let go,
        but for the newest and all that a checkpoint, an evaluation or a group names. A file is
        removed `grace` (and up to a day) after it fell out of use, so that queries which still read
        it can end; without grace at once, for where nobody else has the lake open.

        Returns:
            Data files of the newest snapshot `before` and `after`, files `removed`, snapshots
            `expired`, and bytes of the data folder, `bytes_before` and `bytes_after`.
        """
        before, size = self._data_files(), self._bytes()
        # DuckLake compares these times as text in SQLite, where "... 23:59" comes before "...T00".
        age = f"older_than => now() - interval {int(grace.total_seconds())} second - interval 1 day"
        which = age if grace else "cleanup_all => true"
        with _turn(self.home, self._patience):
            expired = self._expendable(keep) if keep is not None else []
            for message, call in (
                (
                    "expire snapshots",
                    f"expire_snapshots('lake', versions => {expired})" if expired else "",
                ),
                ("rewrite files", "rewrite_data_files('lake', delete_threshold => 0.5)"),
                ("merge small files", "merge_adjacent_files('lake')"),
            ):
                if call:
                    self._commit("lake", message, [f"call ducklake_{call}"])
            with self._reading() as con:
                removed = [
                    con.execute(f"call ducklake_{name}('lake', {which})").fetchall()
                    for name in ("cleanup_old_files", "delete_orphaned_files")
                ]
        for spilled in (self.home / SPILL).glob("duckdb-*"):  # by a process that was killed
            if time.time() - spilled.stat().st_mtime > timedelta(days=2).total_seconds():
                shutil.rmtree(spilled, ignore_errors=True)
        return {
            "before": before,
            "after": self._data_files(),
            "removed": sum(map(len, removed)),
            "expired": len(expired),
            "bytes_before": size,
            "bytes_after": self._bytes(),
        }

    def _expendable(self, keep: timedelta) -> list[int]:
        """Snapshots older than `keep` that are not the newest and that nothing names.

        Groups count as well: a training run may be reading theirs and has no checkpoint yet.
        """
        found = self.query(_EXPENDABLE, [datetime.now(UTC) - keep])
        return found["snapshot_id"].to_pylist()

    def _bytes(self) -> int:
        """Bytes of all files in the data folder, those waiting for removal included."""
        total = 0
        for path in (self.home / DATA).rglob("*"):
            with suppress(OSError):  # another process removes it just now
                total += path.stat().st_size if path.is_file() else 0
        return total

    def _data_files(self) -> int:
        files = self.query("select sum(file_count)::bigint from ducklake_table_info('lake')")
        return files[0][0].as_py()

    def _commit(self, author: str, message: str, statements: Sequence[str]) -> None:
        """Run `statements` in one transaction; again, with back-off, while others lock the lake."""
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
