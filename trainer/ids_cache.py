"""Token ids on disk: made once for a set of files, a split and a tokenizer, then mapped.

A cache file is Arrow's IPC format, one row whose lists are the arrays of `packing.Ids`, and is
found by what its ids are made from. It carries their hash, so one that is cut off or damaged is
made again. Where the folder is belongs to the caller; making ids to `packing`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.errors import BadGroupsError
from trainer.packing import Ids, Progress, tokenise
from trainer.template import Template

VERSION = "1"
ARRAYS = {"tokens": pa.int32(), "starts": pa.int64(), "first": pa.int64(), "ranks": pa.int32()}


def cached_ids(
    paths: Sequence[Path],
    template: Template,
    folder: Path | None,
    *,
    split: str = "train",
    progress: Progress | None = None,
) -> tuple[Ids, dict[str, int]]:
    """What `tokenise` gives, mapped from `folder` if it lies there, else made and put there.

    Without a folder nothing is kept.

    Raises:
        BadGroupsError: as `tokenise`.
    """
    if folder is None:
        return tokenise(paths, template, split=split, progress=progress)
    file = Path(folder) / f"ids-{_key(paths, template, split)}.arrow"
    found = _read(file)
    if found is None:
        ids, counts = tokenise(paths, template, split=split, progress=progress)
        _write(file, ids, counts)
        found = _read(file)
    if found is None:
        msg = f"{file}: what was written there a moment ago cannot be read; check the disk"
        raise BadGroupsError(msg)
    return found


def _key(paths: Sequence[Path], template: Template, split: str) -> str:
    """A hash of all that the ids depend on."""
    total = hashlib.blake2b(digest_size=16)
    total.update("\0".join([VERSION, template.fingerprint, split]).encode())
    for path in map(Path, paths):
        if not path.is_file():
            msg = f"{path}: no such file; give a groups file (.parquet or .jsonl)"
            raise BadGroupsError(msg)
        with path.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "blake2b").digest())
        total.update(path.suffix.encode())
    return total.hexdigest()


def _write(file: Path, ids: Ids, counts: dict[str, int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = [_one_row(pa.array(getattr(ids, name), kind)) for name, kind in ARRAYS.items()]
    columns.append(_one_row(pa.array(ids.group_ids, pa.string())))
    metadata = {"digest": ids.digest(), "counts": json.dumps(counts)}
    table = pa.table(columns, names=[*ARRAYS, "group_ids"]).replace_schema_metadata(metadata)
    draft = file.with_suffix(f".{os.getpid()}")
    with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    draft.replace(file)


def _one_row(values: pa.Array) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)


def _read(file: Path) -> tuple[Ids, dict[str, int]] | None:
    """The ids of a cache file, or None if it is not there or not what was written."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        arrays: dict[str, np.ndarray] = {
            name: table.column(name).chunk(0).flatten().to_numpy() for name in ARRAYS
        }
        names = table.column("group_ids").chunk(0).flatten().to_pylist()
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        ids = Ids(**arrays, group_ids=names)
        if ids.digest() == metadata["digest"] and len(names) == len(ids):
            return ids, json.loads(metadata["counts"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        pass  # pyarrow's faults are ValueErrors or OSErrors; the file is made again
    return None
