"""Files that prompts are drawn from: Parquet, JSONL, JSON arrays and folders of texts, row by row.

A row that cannot be read is a `BadRow` in its place, never an end. What is asked in a row of the
usual instruction formats is found here too; which rows are drawn is said in `prompt_sources.py`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.engines.recorded.jsonl import BadLine, encodable, parse_line
from pipelines.errors import BadInputError

TABLES = (".parquet", ".jsonl", ".json")
TEXTS = (".txt", ".md", ".text")
ABOUT = ("readme", "license", "licence", "changelog")
BATCH = 1024  # Parquet rows in memory at a time
BYTES_PER_CHARACTER = 6  # of JSON at most: \uXXXX

ASKED = ("prompt", "question", "query", "input", "text")
ANSWERED = ("response", "output", "answer", "completion", "reference")
SYSTEM = ("system", "system_prompt")
TURNS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
ROLES |= {"developer": "system"}


class BadRow(ValueError):  # noqa: N818 - it is a row, and as often kept as raised
    """A row that cannot be used: what is wrong and what to do, with one word for the counts."""

    def __init__(self, problem: str, reason: str, field: str = "", raw: str = ""):
        super().__init__(problem)
        self.reason, self.field, self.raw = reason, field, raw


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a row asks: the user's words, the system's before them, and the answer if it has one."""

    text: str
    system: str | None = None
    reference: str | None = None


def find_files(path: str, base: Path) -> list[Path]:
    """The files that a path, a folder or a pattern (`data/*.jsonl`) names, sorted.

    Raises:
        BadInputError: there are none, or one is of a kind that is not read.
    """
    place = Path(path) if Path(path).is_absolute() else base / path
    if place.is_dir():
        files = [p for p in place.rglob("*") if p.is_file() and p.suffix in (*TABLES, *TEXTS)]
        found = [p for p in files if not _about(p.relative_to(place))]
    elif place.is_file():
        found = [place]
    else:
        anchor = Path(place.anchor)
        found = [p for p in anchor.glob(str(place.relative_to(anchor))) if p.is_file()]
    if not found:
        msg = f"{place}: no file there; a path is relative to the configuration"
        raise BadInputError(msg)
    for file in found:
        if file.suffix not in (*TABLES, *TEXTS):
            msg = f"{file}: not one of {', '.join((*TABLES, *TEXTS))}"
            raise BadInputError(msg)
    return sorted(found)


def _about(file: Path) -> bool:
    """Whether a file in a folder of prompts is hidden, or about the folder rather than of it."""
    hidden = any(part.startswith(".") for part in file.parts)
    return hidden or (file.suffix in TEXTS and file.stem.lower() in ABOUT)


def read_rows(file: Path, longest: int) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """The rows of a file with their 1-based numbers; a text file is one row with the key `text`.

    Args:
        file: as `find_files` gives them.
        longest: characters that one row may have; of a text file more are passed over.

    Raises:
        BadInputError: the file as a whole is unreadable.
    """
    readers = {".parquet": _parquet, ".jsonl": _jsonl, ".json": _json}
    yield from readers.get(file.suffix, _text)(file, longest)


def count_rows(file: Path) -> int:
    """Rows of a file, bad ones included, found quickly."""
    if file.suffix == ".parquet":
        return _open(file).metadata.num_rows
    if file.suffix == ".jsonl":
        rows, block = 0, b"\n"
        with file.open("rb") as lines:
            while more := lines.read(1 << 20):
                rows, block = rows + more.count(b"\n"), more
        return rows + (not block.endswith(b"\n"))
    return sum(1 for _ in read_rows(file, 1 << 30)) if file.suffix == ".json" else 1


def asked(row: Mapping[str, Any], column: str | None = None) -> Asked:
    """What a row of a usual instruction format asks.

    Known are alpaca (instruction, input, output), sharegpt (conversations of from and value),
    messages (role and content) and a plain column: `column`, or prompt, question, query, input,
    text. Of a conversation the first user turn is asked, with the system turns before it; without
    `column`, a field system or system_prompt is a system turn as well.

    Raises:
        BadRow: none of these, or nothing in it.
    """
    if column is not None:
        return _plain(row, column)
    found = _asked(row)
    beside = (row.get(name) for name in SYSTEM)
    said = (found.system, *beside)
    system = next((one for one in said if isinstance(one, str) and one.strip()), None)
    return replace(found, system=system)


def _asked(row: Mapping[str, Any]) -> Asked:
    for name in TURNS:
        if row.get(name) is not None:
            return _first_turn(row[name], name)
    if row.get("instruction") is not None:
        main = _words(row, "instruction")
        more = row.get("input")
        text = f"{main}\n\n{more}" if isinstance(more, str) and more.strip() else main
        return Asked(text=text, reference=_answer(row))
    for name in ASKED:
        if isinstance(row.get(name), list):
            return _first_turn(row[name], name)
        if row.get(name) is not None:
            return _plain(row, name)
    msg = (
        f"nothing is asked: expected one of instruction, {', '.join((*TURNS, *ASKED))}; "
        f"found {', '.join(map(str, row)) or 'nothing'}. Name the column in `column`"
    )
    raise BadRow(msg, "missing")


def _plain(row: Mapping[str, Any], column: str) -> Asked:
    return Asked(text=_words(row, column), reference=_answer(row))


def _words(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        msg = f"{column} is {'null' if column in row else 'missing'}; give it or remove the row"
        raise BadRow(msg, "missing", column)
    if not isinstance(value, str):
        msg = f"{column} is {value!r:.60}, expected text"
        raise BadRow(msg, "wrong_type", column)
    if not value.strip():
        msg = f"{column} is blank; give it words or remove the row"
        raise BadRow(msg, "empty", column)
    return value


def _answer(row: Mapping[str, Any]) -> str | None:
    values = (row.get(name) for name in ANSWERED)
    return next((v for v in values if isinstance(v, str) and v.strip()), None)


def _first_turn(turns: Any, column: str) -> Asked:
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError:
            turns = None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        msg = f"{column} is no list of turns with role and content (or from and value)"
        raise BadRow(msg, "wrong_type", column)
    said = [
        (
            ROLES.get(str(turn.get("role", turn.get("from"))), turn.get("role", turn.get("from"))),
            turn.get("content", turn.get("value")),
        )
        for turn in turns
    ]
    for place, (role, content) in enumerate(said):
        if role == "user":
            text = _words({column: content}, column)
            system = [
                _words({column: c}, column)
                for r, c in said[:place]
                if r == "system" and str(c or "").strip()
            ]
            answer = [c for r, c in said[place + 1 : place + 2] if r == "assistant"]
            return Asked(
                text=text,
                system="\n\n".join(system) or None,
                reference=answer[0] if answer and isinstance(answer[0], str) else None,
            )
    msg = f"{column} has no user turn; its roles are {[role for role, _ in said]!r:.80}"
    raise BadRow(msg, "missing", column)


def _jsonl(file: Path, longest: int) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    most = BYTES_PER_CHARACTER * longest + 4096
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(most):
            number += 1
            if len(line) == most and not line.endswith(b"\n"):
                size = len(line)
                while (more := lines.readline(1 << 20)) and not more.endswith(b"\n"):
                    size += len(more)
                yield number, _too_long(f"{size + len(more):,} bytes", longest, line)
                continue
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, _parsed(line, longest)


def _parsed(line: bytes, longest: int) -> dict[str, Any] | BadRow:
    raw = line[:1000].decode(errors="replace").strip()
    try:
        row = parse_line(line)
    except BadLine as bad:
        return BadRow(str(bad), bad.reason, raw=raw)
    return _row(row, longest, raw)


def _row(row: Any, longest: int, raw: str) -> dict[str, Any] | BadRow:
    if not isinstance(row, dict):
        msg = f"a JSON {type(row).__name__}; an object is expected"
        return BadRow(msg, "not_json", raw=raw)
    for name, value in row.items():
        if isinstance(value, str):
            if len(value) > longest:
                return _too_long(f"{name} of {len(value):,} characters", longest, raw.encode())
            if not encodable(value):
                msg = f"{name} holds half a surrogate pair, which is no character"
                return BadRow(msg, "not_utf8", name, raw)
    return row


def _too_long(what: str, longest: int, raw: bytes) -> BadRow:
    msg = f"{what}, longer than {longest:,} characters; split it, or raise max_characters"
    return BadRow(msg, "too_long", raw=raw[:1000].decode(errors="replace"))


def _json(file: Path, longest: int) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        msg = f"{file}: not a JSON array: {error}"
        raise BadInputError(msg) from error
    if not isinstance(rows, list):
        msg = f"{file}: a JSON {type(rows).__name__}; an array of objects is expected"
        raise BadInputError(msg)
    for number, row in enumerate(rows, 1):
        yield number, _row(row, longest, json.dumps(row, ensure_ascii=True)[:1000])


def _parquet(file: Path, longest: int) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    number = 0
    for batch in _open(file).iter_batches(BATCH):
        try:
            rows: list[Any] = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [_one(batch.slice(at, 1)) for at in range(batch.num_rows)]
        for row in rows:
            number += 1
            yield number, row if isinstance(row, BadRow) else _row(row, longest, f"{row!r:.1000}")


def _one(row: pa.RecordBatch) -> dict[str, Any] | BadRow:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError:
        return BadRow("not valid UTF-8; write the file again in UTF-8", "not_utf8")


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        msg = f"{file} is not a readable Parquet file: {error}"
        raise BadInputError(msg) from error


def _text(file: Path, longest: int) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    try:
        with file.open(encoding="utf-8-sig") as text:
            yield 1, {"text": text.read(longest)}
    except UnicodeDecodeError as error:
        msg = f"not valid UTF-8 at byte {error.start + 1}; write the file again in UTF-8"
        yield 1, BadRow(msg, "not_utf8")
