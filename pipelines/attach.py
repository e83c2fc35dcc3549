"""Attaching the lake to DuckDB: where its files are, connections with limits, faults in words.

What is done on a connection is in `lake.py` (the pipeline) and `assets/sql.py` (people).
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from pipelines import locks
from pipelines.errors import LakeError, PolarError

CATALOG = Path("lake", "catalog.sqlite")  # under POLAR_HOME
DATA = Path("lake", "data")
SPILL = Path("staging")

_DISK = ("No space left", "File too large", "disk I/O error", "disk is full", "Could not write")


def connect(
    home: Path,
    *,
    read_only: bool,
    snapshot: int | None = None,
    threads: int = 2,
    memory_limit: str = "2GB",
) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection whose current catalogue is the lake under `home`, named `lake`.

    `snapshot` shows the lake as it was then. Closing it removes what it spilled to disk.

    Raises:
        LakeError: there is no lake, no such snapshot, or it cannot be opened.
    """
    home = home.absolute()
    if read_only and not (home / CATALOG).exists():
        msg = f"{home}: no lake here; `make demo` or `polar run --config FILE` makes one"
        raise LakeError(msg)
    with suppress(OSError):  # somebody else's lake: ask without spilling
        (home / SPILL).mkdir(exist_ok=True)
    spill = home / SPILL / f"duckdb-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    con = duckdb.connect(
        config={
            "threads": threads,
            "memory_limit": memory_limit,
            # Processes that share a folder would overwrite each other's spilled blocks.
            "temp_directory": str(spill),
            "autoinstall_known_extensions": False,
            "arrow_lossless_conversion": True,  # ids as pa.uuid(); see `plain` for its price
            "python_enable_replacements": False,
        }
    )
    try:
        for name in ("ducklake", "sqlite_scanner"):
            con.execute(f"load {quoted(str(_extension(name)))}")
        if read_only:  # a lake's files never change; what a writer reads besides may
            con.execute("set parquet_metadata_cache = true")
        use(con, home, "lake", read_only=read_only, snapshot=snapshot)
    except BaseException:
        con.close()
        raise
    return con


def use(
    con: duckdb.DuckDBPyConnection,
    home: Path,
    name: str,
    *,
    read_only: bool,
    snapshot: int | None = None,
) -> None:
    """Attach the lake under `home` as `name` and make it the current catalogue of `con`.

    Raises:
        LakeError: it cannot be opened, or has no such snapshot.
    """
    options = [f"data_path {quoted(f'{home / DATA}/')}", "override_data_path true"]
    # Readers and writers of a SQLite catalogue wait for each other unless its journal is a WAL.
    options.append("read_only" if read_only else "meta_journal_mode 'WAL'")
    if snapshot is not None:
        options.append(f"snapshot_version {int(snapshot)}")
    source = quoted(f"ducklake:sqlite:{home / CATALOG}")
    try:
        con.execute(f"attach {source} as {name} ({', '.join(options)})")
        con.execute(f"use {name}")
        con.execute("set timezone = 'UTC'")
    except duckdb.Error as error:
        if "No snapshot found" in str(error):
            msg = (
                f"the lake at {home} has no snapshot {snapshot}; `from lake.snapshots()` lists all"
            )
            raise LakeError(msg) from None
        raise fault(error, home, "open the lake") from error


def quoted(text: str) -> str:
    """An SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def scratch(con: duckdb.DuckDBPyConnection) -> Path:
    """The folder that this connection alone spills to."""
    ((path,),) = con.execute("select current_setting('temp_directory')").fetchall()
    return Path(path)


def plain(result: pa.Table) -> pa.Table:
    """Booleans and sums as Arrow's own types, instead of extensions that keep every bit of DuckDB.

    A sum of integers is a 128-bit HUGEINT in DuckDB; its low half is the value up to 63 bits.
    """
    for at, (name, column) in enumerate(zip(result.schema.names, result.columns, strict=True)):
        kind = column.type
        if isinstance(kind, pa.Bool8Type):
            result = result.set_column(at, name, column.cast(pa.bool_()))
        elif isinstance(kind, pa.OpaqueType) and kind.type_name == "hugeint":
            values = b"".join(value or bytes(16) for value in column.to_pylist())
            low, high = np.frombuffer(values, "<i8").reshape(-1, 2).T
            if (high == low >> 63).all():
                mask = column.is_null().to_numpy()
                result = result.set_column(at, name, pa.array(low, mask=mask))
    return result


@contextmanager
def interruptible(con: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Turn Ctrl-C in a query into KeyboardInterrupt; a connection not told would hang next time."""
    try:
        yield
    except KeyboardInterrupt:
        con.interrupt()
        raise
    except RuntimeError as error:  # how DuckDB's Python client reports the signal
        if "interrupted" not in str(error):
            raise
        con.interrupt()
        raise KeyboardInterrupt from None


def contended(error: BaseException) -> bool:
    """Whether trying again can help: a lock, or a commit that another one has overtaken."""
    return isinstance(error, duckdb.Error) and any(
        sign in str(error) for sign in ("is locked", "onflict")
    )


def fault(
    error: duckdb.Error, home: Path, doing: str, kind: type[PolarError] = LakeError
) -> PolarError:
    """The error to raise instead: a LakeError for locks, disk and memory, else one of `kind`."""
    text = str(error)
    first = text.split("\n", 1)[0]
    if contended(error):
        catalog = home / CATALOG
        return locked(home, catalog, catalog.with_name(catalog.name + "-shm"))
    if any(sign in text for sign in _DISK):
        return LakeError(
            f"cannot {doing}: writing under {home} failed ({first}); "
            f"{shutil.disk_usage(home).free / 2**30:.1f} GiB are free there. The last snapshot is "
            "intact: free space and run again"
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return LakeError(f"cannot {doing}: {first}. Raise memory_limit, or ask for less at once")
    return kind(f"cannot {doing}: {text}")


def locked(home: Path, *files: Path) -> LakeError:
    """The error for a lake that others keep locked, by one of `files`."""
    return LakeError(
        f"the lake at {home} is locked for writing by {locks.holders(*files)}. The last snapshot "
        "is intact: try again when that has finished, or end it"
    )


def _extension(name: str) -> Path:
    """The signed binary that the package of the same name carries; nothing is downloaded."""
    folder = resources.files(f"duckdb_extension_{name}") / "extensions" / f"v{duckdb.__version__}"
    return Path(str(folder)) / f"{name}.duckdb_extension"
