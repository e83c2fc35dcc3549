"""The groups file: its schema, and reading it from Parquet and JSONL.

One row is one group: a reference and K candidates with ranks (0 is best). Parquet holds it as
`GROUPS_SCHEMA` says; JSONL may hold the same fields, or the official ones (`prompt`, `reference`,
`chosen`, `rejected`, optionally `wrapper`), which are a group of two.

How text becomes ids belongs to `template`; ids and batches belong to `packing`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.errors import BadGroupsError
from trainer.template import Texts, joined

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
CANDIDATE = pa.struct(
    [
        ("trajectory_id", pa.string()),
        ("text", pa.string()),
        ("rank", pa.int32()),
        ("policy_id", pa.string()),
        ("relation", pa.string()),
        ("policy_group", pa.string()),
    ]
)
GROUPS_SCHEMA = pa.schema(
    [
        ("group_id", pa.string()),
        ("wrapper", pa.string()),
        ("prompt", pa.list_(MESSAGE)),
        ("reference", pa.string()),
        ("candidates", pa.list_(CANDIDATE)),
        ("category", pa.string()),
        ("split", pa.string()),
        ("cell", pa.string()),
        ("prompt_group", pa.string()),
        ("policy_group", pa.string()),
    ]
)
"""`policy_group` of a row is the reference's; `prompt_group` and it are what intervals resample."""
REQUIRED = ("group_id", "wrapper", "prompt", "reference", "candidates")


def read_groups(paths: Sequence[Path]) -> pa.Table:
    """All groups of Parquet and JSONL files as one table with `GROUPS_SCHEMA`.

    Raises:
        BadGroupsError: a file is missing or unreadable, or a row does not fit; it names the file,
            the column or line, what was expected and the fix.
    """
    tables = [table for path in paths for table in stream_groups(path)]
    return pa.concat_tables(tables) if tables else GROUPS_SCHEMA.empty_table()


def stream_groups(path: Path, rows: int = 2048) -> Iterator[pa.Table]:
    """The groups of one file, some rows at a time (arguments and errors as `read_groups`)."""
    path = Path(path)
    if not path.is_file():
        msg = f"{path}: no such file; give a groups file (.parquet or .jsonl)"
        raise BadGroupsError(msg)
    if path.suffix == ".parquet":
        yield from _stream_parquet(path, rows)
    elif path.suffix in {".jsonl", ".json"}:
        yield from _stream_jsonl(path, rows)
    else:
        msg = f"{path}: unknown kind of file {path.suffix!r}; groups are .parquet or .jsonl"
        raise BadGroupsError(msg)


def _stream_parquet(path: Path, rows: int) -> Iterator[pa.Table]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        msg = f"{path}: not a readable Parquet file ({error}); make it again"
        raise BadGroupsError(msg) from error
    with file:
        present = [name for name in GROUPS_SCHEMA.names if name in file.schema_arrow.names]
        for name in REQUIRED:
            if name not in present:
                kind = GROUPS_SCHEMA.field(name).type
                msg = f"{path}: column {name!r} is missing; expected type {kind}"
                raise BadGroupsError(msg)
        first = 0
        try:
            for batch in file.iter_batches(rows, columns=present):
                table = _conform(pa.Table.from_batches([batch]), path)
                _check(table, _numbered(f"{path}: row ", first))
                first += len(table)
                yield table
        except (pa.ArrowInvalid, OSError) as error:
            msg = f"{path}: damaged after row {first} ({error}); make it again"
            raise BadGroupsError(msg) from error


def _numbered(name: str, first: int) -> Callable[[int], str]:
    return lambda row: f"{name}{first + row}"


def _conform(table: pa.Table, path: Path) -> pa.Table:
    """Columns in the schema's order and types, whatever order or width they were written with.

    A column that training can do without is filled with nulls, a missing split with `train`.
    """
    columns = []
    for wanted in GROUPS_SCHEMA:
        if wanted.name not in table.column_names:
            missing = "train" if wanted.name == "split" else None
            columns.append(pa.array([missing] * len(table), wanted.type))
            continue
        column = table.column(wanted.name)
        try:
            columns.append(column.cast(wanted.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            msg = f"{path}: column {wanted.name!r} is {column.type}; expected {wanted.type}"
            raise BadGroupsError(msg) from error
    conformed = pa.table(columns, schema=GROUPS_SCHEMA)
    conformed.validate(full=True)  # also that text is UTF-8
    return conformed


def _check(table: pa.Table, where: Callable[[int], str]) -> None:
    """Values without which a group means nothing."""
    candidates = table.column("candidates").combine_chunks()
    texts = candidates.flatten()
    needed = {
        "wrapper": table.column("wrapper"),
        "prompt": table.column("prompt"),
        "reference": table.column("reference"),
        "candidates": candidates,
        "candidates.text": texts.field("text"),
        "candidates.rank": texts.field("rank"),
    }
    for name, values in needed.items():
        if values.null_count:
            empty = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
            row = int(empty[0])
            if name.startswith("candidates."):
                row = int(candidates.value_parent_indices()[row].as_py())
            msg = f"{where(row)}: {name} is null; every group needs one"
            raise BadGroupsError(msg)
    for row, wrapper in enumerate(table.column("wrapper").to_pylist()):
        if wrapper not in {"pretrain", "sft"}:
            msg = f"{where(row)}: wrapper {wrapper!r}; expected 'pretrain' or 'sft'"
            raise BadGroupsError(msg)


def _stream_jsonl(path: Path, rows: int) -> Iterator[pa.Table]:
    buffer: list[dict[str, Any]] = []
    for number, record in read_jsonl(path):
        buffer.append(_group_of(record, f"{path}: line {number}", number))
        if len(buffer) == rows:
            yield _table_of(buffer, path)
            buffer = []
    if buffer:
        yield _table_of(buffer, path)


def _table_of(records: list[dict[str, Any]], path: Path) -> pa.Table:
    try:
        table = pa.Table.from_pylist(records, GROUPS_SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
        ids = f"{records[0]['group_id']} to {records[-1]['group_id']}"
        msg = f"{path}: groups {ids} do not fit the schema of a groups file: {error}"
        raise BadGroupsError(msg) from error
    _check(table, lambda row: f"{path}: group {records[row]['group_id']}")
    return table


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and objects of a JSONL file; blank lines are passed over.

    Raises:
        BadGroupsError: a line is not UTF-8, not JSON or not an object.
    """
    with path.open("rb") as lines:
        yield from parse_jsonl(lines, str(path))


_ONE_A_LINE = "give one object a line, not one list of all (`jq -c '.[]'` makes lines)"


def parse_jsonl(lines: Iterator[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_jsonl`, for any stream of lines; `name` opens each error."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both
            advice = _ONE_A_LINE if line.lstrip()[:1] == b"[" else "mend or remove the line"
            msg = f"{name}: line {number}: not UTF-8 JSON ({error}); {advice}"
            raise BadGroupsError(msg) from error
        if not isinstance(record, dict):
            msg = (
                f"{name}: line {number}: {type(record).__name__} where an object is expected; "
                f"{_ONE_A_LINE}"
            )
            raise BadGroupsError(msg)
        yield number, record


def text_of(record: Mapping[str, Any], key: str, where: str) -> str:
    """A text field, which may be a string or a list of messages with string contents.

    Raises:
        BadGroupsError: the field is missing or of another shape.
    """
    value = record.get(key)
    messages = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) for m in value
    )
    if isinstance(value, str) or messages:
        text = joined(cast("str | list[dict[str, Any]]", value))
        if text.isascii() or _encodable(text):
            return text
    state = "is missing" if key not in record else f"is {value!r:.80}"
    msg = (
        f"{where}: field {key!r} {state}; give a string or a list of messages "
        f'like {{"role": "user", "content": "..."}}'
    )
    raise BadGroupsError(msg)


def _encodable(text: str) -> bool:
    """Whether no half of a surrogate pair stands alone, as JSON escapes allow."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _group_of(record: dict[str, Any], where: str, number: int) -> dict[str, Any]:
    """One JSON object, ours or the official one, as a row of `GROUPS_SCHEMA`."""
    prompt = record.get("prompt")
    group = {
        "group_id": f"line-{number}",
        "wrapper": "sft",
        "split": "train",
        **record,
        "prompt": [{"role": "user", "content": text_of(record, "prompt", where)}],
        "reference": text_of(record, "reference", where),
    }
    if isinstance(prompt, list):
        group["prompt"] = [
            {"role": str(m.get("role", "user")), "content": m["content"]} for m in prompt
        ]
    if "candidates" not in record:
        answers = [text_of(record, key, where) for key in ("chosen", "rejected")]
        group["candidates"] = [{"text": text, "rank": i} for i, text in enumerate(answers)]
        return group
    candidates = record["candidates"]
    if not isinstance(candidates, list) or not all(isinstance(c, dict) for c in candidates):
        msg = f"{where}: field 'candidates' must be a list of objects with text and rank"
        raise BadGroupsError(msg)
    group["candidates"] = [{**c, "text": text_of(c, "text", where)} for c in candidates]
    for candidate in candidates:
        if type(candidate.get("rank")) is not int:
            rank = candidate.get("rank")
            msg = f"{where}: candidate rank {rank!r}; give a whole number, 0 for the best"
            raise BadGroupsError(msg)
    return group


def texts_of(table: pa.Table) -> list[Texts]:
    """The texts of each group, ready for the template."""
    columns = ("prompt", "reference", "candidates", "wrapper")
    return [
        Texts(joined(prompt), reference, [c["text"] for c in candidates], wrapper)
        for prompt, reference, candidates, wrapper in zip(
            *(table.column(name).to_pylist() for name in columns), strict=True
        )
    ]
