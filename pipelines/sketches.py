"""Sketches: what dedup keeps of each answer, made once, from then on instead of the text.

A part is a folder with the answers of some row groups, in the order they were read: signatures,
distinct shingles, and rows (ids, source, a 128-bit hash of the text). Texts are read here and
nowhere else in dedup. A part is one Beam element, so processes or machines make parts side by
side. What is found in them is a matter of `near.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import xxhash

from pipelines import ids, minhash
from pipelines.errors import BadInputError
from pipelines.minhash import MinHashSettings, Shingles

BATCH_ROWS = 8_192  # texts in memory at a time
PART_ROWS = 65_536  # row groups are put together up to this, never cut
COLUMNS = ("trajectory_id", "prompt_id", "source", "text")
SIGNATURES, ROWS = "signatures.arrow", "rows.arrow"
SHINGLES, SIZES = "shingles.u32", "sizes.i64"
SUMMARY = pa.schema(
    [
        ("trajectory_id", pa.uuid()),
        ("prompt_id", pa.uuid()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("digest", pa.binary(16)),
        ("empty", pa.bool_()),
    ]
)


class Piece(NamedTuple):
    """Row groups of a Parquet file, and the folder of the part that they become."""

    file: str
    groups: tuple[int, ...]
    part: str


def pieces(files: Sequence[Path], folder: Path, first: int = 0) -> list[Piece]:
    """What to sketch: parts under `folder`, numbered from `first` in the order of the files.

    Raises:
        BadInputError: a file lacks a column, or has nulls in one.
    """
    found: list[Piece] = []
    for file in files:
        with pq.ParquetFile(file) as source:
            missing = [name for name in COLUMNS if name not in source.schema_arrow.names]
            groups = [source.metadata.row_group(i) for i in range(source.num_row_groups)]
        if missing:
            msg = f"{file}: dedup needs the columns {', '.join(COLUMNS)}; missing: {missing}"
            raise BadInputError(msg)
        for group in groups:
            _refuse_nulls(file, group)
        sizes = [group.num_rows for group in groups]
        group = 0
        while group < len(sizes):
            end = group + 1
            while end < len(sizes) and sum(sizes[group : end + 1]) <= PART_ROWS:
                end += 1
            part = folder / f"{first + len(found):06d}"
            found.append(Piece(str(file), tuple(range(group, end)), str(part)))
            group = end
    return found


def sketch(piece: Piece, settings: MinHashSettings) -> int:
    """Make one part and give its number of rows; made again, it replaces the first."""
    final = Path(piece.part)
    part = final.with_suffix(".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    kept, sizes = [], [np.zeros(0, np.int64)]
    schema = minhash.signatures_schema(settings)
    with (
        pa.ipc.new_file(str(part / SIGNATURES), schema) as writer,
        (part / SHINGLES).open("wb") as shingles,
    ):
        for batch in _read(piece):
            sets = minhash.shingles(batch["text"], settings.words)
            values = pa.array(minhash.signatures(sets, settings).reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(values, type=schema.field("signature").type)
            writer.write_batch(pa.record_batch([batch["trajectory_id"], column], schema=schema))
            sets = minhash.distinct(sets)
            sets.hashes.tofile(shingles)
            sizes.append(np.diff(sets.offsets))
            kept.append(_summary(batch, sizes[-1] == 0))
    np.concatenate(sizes).tofile(part / SIZES)
    rows = pa.Table.from_batches(kept, SUMMARY).unify_dictionaries().combine_chunks()
    feather.write_feather(rows, part / ROWS, compression="uncompressed")
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    return rows.num_rows


def read_rows(parts: Sequence[Path]) -> pa.Table:
    """The rows of parts, in order, with the schema `SUMMARY`."""
    tables = [feather.read_table(part / ROWS) for part in parts]
    return pa.concat_tables([SUMMARY.empty_table(), *tables])


def read_shingles(parts: Sequence[Path], rows: np.ndarray) -> Shingles:
    """The distinct shingles of some rows, numbered over all parts, ascending.

    Only what is asked for is read, and no file stays open.
    """
    hashes, sizes, first = [np.zeros(0, np.uint32)], [np.zeros(0, np.int64)], 0
    for part in parts:
        every = np.fromfile(part / SIZES, np.int64)
        low, high = np.searchsorted(rows, [first, first + len(every)])
        if low < high and every.any():
            stored = np.memmap(part / SHINGLES, np.uint32, mode="r")
            some = Shingles(stored, np.append(0, np.cumsum(every))).take(rows[low:high] - first)
            hashes.append(some.hashes)
            sizes.append(np.diff(some.offsets))
        else:
            sizes.append(np.zeros(high - low, np.int64))
        first += len(every)
    return Shingles(np.concatenate(hashes), np.append(0, np.cumsum(np.concatenate(sizes))))


def read_signatures(part: Path) -> pa.Table:
    """The signatures of a part (trajectory_id, signature), mapped from its file."""
    return pa.ipc.open_file(pa.memory_map(str(part / SIGNATURES))).read_all()


def join_signatures(parts: Sequence[Path], settings: MinHashSettings, file: Path) -> None:
    """Write the signatures of all parts into one Parquet file."""
    partial = file.with_suffix(".tmp")
    schema = minhash.signatures_schema(settings)
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(partial, schema, **options) as writer:
        for part in parts:
            writer.write_table(read_signatures(part), row_group_size=BATCH_ROWS)
    partial.replace(file)


def _refuse_nulls(file: Path, group: pq.RowGroupMetaData) -> None:
    columns = [group.column(i) for i in range(group.num_columns)]
    for column in columns:
        statistics = column.statistics
        if column.path_in_schema in COLUMNS and statistics is not None and statistics.null_count:
            name = column.path_in_schema
            msg = f"{file}: column {name} holds nulls; quarantine such rows before dedup"
            raise BadInputError(msg)


def _read(piece: Piece) -> Iterator[pa.RecordBatch]:
    """Batches of the columns that are used."""
    with pq.ParquetFile(piece.file) as source:
        columns = [n for n in (*COLUMNS, "content_hash") if n in source.schema_arrow.names]
        yield from source.iter_batches(BATCH_ROWS, row_groups=list(piece.groups), columns=columns)


def _summary(batch: pa.RecordBatch, empty: np.ndarray) -> pa.RecordBatch:
    """A batch without its texts, but with a 128-bit hash of each, made here if none came."""
    if "content_hash" in batch.schema.names:
        digests = ids.storage(batch["content_hash"])
    else:
        texts = batch["text"].cast(pa.binary()).to_pylist()
        digests = pa.array([xxhash.xxh3_128_digest(text) for text in texts], pa.binary(16))
    columns = [batch[name] for name in ("trajectory_id", "prompt_id", "source")]
    columns += [digests, pa.array(empty)]
    return pa.record_batch([c.cast(f.type) for c, f in zip(columns, SUMMARY, strict=True)], SUMMARY)
