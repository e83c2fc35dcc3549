"""Parquet files of recorded trajectories as Arrow: wrong columns refused, bad rows set apart."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.engines.recorded.columns import COLUMNS, NAMES, WORDS, Column, with_source
from pipelines.engines.recorded.ledger import Batch, Ledger
from pipelines.errors import BadInputError
from pipelines.schemas import BOOL, MESSAGES, REAL, TEXT


def metadata_of(path: Path) -> pq.FileMetaData:
    """The file's number of rows and columns.

    Raises:
        BadInputError: it is not Parquet.
    """
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        msg = f"{path} is not a readable Parquet file: {error}"
        raise BadInputError(msg) from error


def read_parquet(path: Path, batch: Batch, source: str, ledger: Ledger) -> Batch:
    """Read a file into the (empty) `batch`; `source` is for rows that name none.

    Raises:
        BadInputError: not Parquet, a required column missing, or one of a type that cannot be
            meant; the message names file, column, the type found and the one expected.
    """
    columns = COLUMNS[batch.label]
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
        _refuse_missing(path, columns, schema.names)
        names = [column.name for column in columns if column.name in schema.names]
        words = [c.name for c in columns if c.arrow == WORDS and c.name in names]
        words = [name for name in words if _textual(schema.field(name).type)]
        with pq.ParquetFile(path, read_dictionary=words) as file:
            found = file.read(columns=names)
    except (pa.ArrowException, OSError) as error:
        msg = f"{path} is not a readable Parquet file: {error}"
        raise BadInputError(msg) from error
    arrays: list[pa.Array | pa.ChunkedArray] = []
    broken: dict[str, np.ndarray] = {}
    for column in columns:
        if column.name in names:
            values, broken[column.name] = _cast(path, column, found[column.name])
        else:
            values = pa.nulls(found.num_rows, column.arrow)
        arrays.append(values)
    arrays.append(pa.array(np.arange(1, found.num_rows + 1)))
    table = pa.Table.from_arrays(arrays, names=[*(column.name for column in columns), "row"])
    batch = Batch(batch.label, batch.file, with_source(table, source))
    ledger.count_rows("in", batch)
    for name, rows in broken.items():
        batch = ledger.reject(
            batch,
            np.isin(batch.table["row"].to_numpy(), rows),
            reason="not_utf8",
            field=name,
            problem=f"{name} is not valid UTF-8; write the file again in UTF-8",
        )
    for column in columns:
        if column.type == REAL:
            finite = pc.fill_null(pc.is_finite(batch.table[column.name]), True)
            batch = ledger.reject(
                batch,
                ~finite.to_numpy(),
                reason="wrong_type",
                field=column.name,
                problem=f"{column.name} is {{{column.name}}}, expected {NAMES[REAL]}",
            )
        if column.required:
            batch = ledger.reject(
                batch,
                batch.table[column.name].is_null().to_numpy(),
                reason="null",
                field=column.name,
                problem=f"{column.name} is null; give it a value or remove the row",
            )
    return batch


def _refuse_missing(path: Path, columns: tuple[Column, ...], found: list[str]) -> None:
    for column in columns:
        if column.required and column.name not in found:
            near = difflib.get_close_matches(column.name, found, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(found)}"
            msg = f"{path}: no column {column.name!r}; {hint}"
            raise BadInputError(msg)


def _textual(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in (*tests, pa.types.is_binary, pa.types.is_large_binary))


def _listed(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests)


def _fits(kind: pa.DataType, column: Column) -> bool:
    integer = pa.types.is_integer(kind)
    number = integer or pa.types.is_floating(kind)
    if pa.types.is_null(kind):
        return True
    if column.type == TEXT:
        return _textual(kind) or (integer and not column.prose)
    if column.type == MESSAGES:
        return _textual(kind) or (_listed(kind) and pa.types.is_struct(kind.value_type))
    return pa.types.is_boolean(kind) if column.type == BOOL else number


def _cast(
    path: Path, column: Column, values: pa.ChunkedArray
) -> tuple[pa.ChunkedArray, np.ndarray]:
    """The values in the column's Arrow type, and the numbers of rows that are not UTF-8."""
    encoded = pa.types.is_dictionary(values.type)
    kind = values.type.value_type if encoded else values.type
    if not _fits(kind, column):
        msg = (
            f"{path}: column {column.name!r} has type {values.type}, expected "
            f"{NAMES[column.type]} ({column.type})"
        )
        raise BadInputError(msg)
    try:
        if _textual(kind):
            return _valid_text(values, column.arrow)
        plain = values.cast(kind) if encoded else values
        if column.type == MESSAGES:
            texts = [None if turns is None else json.dumps(turns) for turns in plain.to_pylist()]
            plain = pa.chunked_array([pa.array(texts, TEXT)])
        exact = column.type != REAL  # a number may lose its last digits
        plain = plain.cast(TEXT if column.arrow == WORDS else column.arrow, safe=exact)
        return plain.dictionary_encode() if column.arrow == WORDS else plain, np.empty(0, int)
    except pa.ArrowInvalid as error:
        msg = f"{path}: column {column.name!r} holds a value that is not {column.type}: {error}"
        raise BadInputError(msg) from error


def _valid_text(values: pa.ChunkedArray, arrow: pa.DataType) -> tuple[pa.ChunkedArray, np.ndarray]:
    bad = np.empty(0, int)
    try:
        values.validate(full=True)
        texts = values if values.type == arrow else values.cast(TEXT)
    except pa.ArrowInvalid:
        encoded = pa.types.is_dictionary(values.type)
        raw = (values.cast(values.type.value_type) if encoded else values).cast(pa.large_binary())
        decoded = [_decode(value) for value in raw.to_pylist()]
        texts = pa.chunked_array([pa.array(decoded, TEXT)])
        bad = np.flatnonzero(texts.is_null().to_numpy() & ~raw.is_null().to_numpy()) + 1
    return (texts.dictionary_encode() if arrow == WORDS else texts), bad


def _decode(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None
