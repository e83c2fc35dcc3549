"""Finished trajectories on disk, between being made and being published.

One Parquet file a batch, there whole or not at all; and for answers that come one by one a journal,
which holds them until they fill a batch. What makes them is in `rollouts.py`, and what publishes
them calls `clear` afterwards.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import ids, locks, schemas

SCHEMA = schemas.TRAJECTORIES.schema
JOURNAL = "journal.jsonl"
Row = Mapping[str, Any]  # of the trajectories table; ids are raw bytes


@contextmanager
def owned(staging: Path, policy_id: UUID | bytes) -> Iterator[None]:
    """Hold a policy's staging, so that two runs at once do not make its answers twice.

    The other run waits; it reads what is present after this one has published.
    """
    staging.mkdir(parents=True, exist_ok=True)
    with locks.exclusive(staging / f"{ids.text(policy_id)}.lock", math.inf):
        yield


def table_of(rows: Sequence[Row]) -> pa.Table:
    """Rows as the trajectories table has them; columns that are not named are null."""
    columns = []
    for field in SCHEMA:
        values = [row.get(field.name) for row in rows]
        is_id = field.type == pa.uuid()
        columns.append(ids.array(values) if is_id else pa.array(values, field.type))
    return pa.table(columns, schema=SCHEMA)


class Journal:
    """Rows that are in safety the moment `add` returns, and wait for their batch to be full.

    In safety from the end of this process, that is: a line is handed to the system, and only the
    batch's file is forced to the disk.
    """

    def __init__(self, folder: Path, size: int):
        """Start empty: what an earlier run left is for `take_up`."""
        self.folder = folder
        self.size = size
        self.rows: list[Row] = []

    def add(self, rows: Sequence[Row]) -> list[Path]:
        """Take rows; returns the file of a batch that they filled, if they did."""
        self.rows += rows
        if len(self.rows) >= self.size:
            return self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(_plain(row))}\n" for row in rows))
        return []

    def close(self) -> list[Path]:
        """Write what is left as one file."""
        if not self.rows:
            return []
        path = write(self.folder, table_of(self.rows))
        (self.folder / JOURNAL).unlink(missing_ok=True)
        self.rows = []
        return [path]


def write(folder: Path, table: pa.Table) -> Path:
    """Write rows of the trajectories table as one file; another file of these rows is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{ids.storage(table['trajectory_id'])[0].as_py().hex()}.parquet"
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return path


def take_up(folder: Path, published: Container[bytes]) -> tuple[list[Path], set[bytes]]:
    """The files that an earlier run left unpublished in a folder, and the trajectory ids in them.

    Unfinished, damaged and outdated files are removed (their rows are made again), and so are
    files all of whose rows are published. A journal becomes a file.
    """
    files: list[Path] = []
    found: set[bytes] = set()
    _end_journal(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        trajectories = _read(path)
        if all(trajectory in published for trajectory in trajectories):
            path.unlink()
        else:
            files.append(path)
            found.update(trajectories)
    return files, found


def clear(files: Iterable[Path]) -> None:
    """Remove staged files that were published, and their folders once empty."""
    for path in files:
        path.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()


def _read(path: Path) -> list[bytes]:
    """The trajectory ids in a staged file; none when it cannot be used."""
    if path.suffix != ".parquet":
        return []
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        return []
    usable = table.schema.equals(schemas.TRAJECTORIES.schema)
    return ids.storage(table["trajectory_id"]).to_pylist() if usable else []


def _end_journal(folder: Path) -> None:
    """Write the rows of a journal that an earlier run left, but for those that are in files."""
    journal = folder / JOURNAL
    if not journal.is_file():
        return
    staged = {trajectory for path in folder.glob("*.parquet") for trajectory in _read(path)}
    rows = {row["trajectory_id"]: row for row in _lines(journal)}
    left = [row for key, row in rows.items() if key not in staged]
    if left:
        write(folder, table_of(left))
    journal.unlink()


def _lines(journal: Path) -> list[dict[str, Any]]:
    """The rows of a journal; a line that its writer was killed over, or of old columns, is none."""
    rows = []
    for line in journal.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.keys() <= set(SCHEMA.names):
            rows.append(_raw(row))
    return rows


def _plain(row: Row) -> dict[str, Any]:
    """A row as JSON can say it."""
    return {
        name: value.hex()
        if isinstance(value, bytes)
        else value.isoformat()
        if isinstance(value, datetime)
        else value
        for name, value in row.items()
    }


def _raw(row: dict[str, Any]) -> dict[str, Any]:
    """The row behind its plain form."""
    for field in SCHEMA:
        value = row.get(field.name)
        if value is not None and field.type == pa.uuid():
            row[field.name] = bytes.fromhex(value)
        elif value is not None and pa.types.is_timestamp(field.type):
            row[field.name] = datetime.fromisoformat(value)
    return row
