"""Finished batches of trajectories on disk, between being made and being published.

One Parquet file a batch, there whole or not at all; what makes them is in `rollouts.py`, and what
publishes them calls `clear` afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import ids, schemas


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
    files all of whose rows are published.
    """
    files: list[Path] = []
    found: set[bytes] = set()
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
