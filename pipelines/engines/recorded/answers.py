"""Answers as trajectories: those of the trajectories file, and those that preferences bring along.

An answer of a policy that nobody names belongs to the policy `unknown:<source>`; it is known by
its text, for such a policy is many.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import ids, prompts, quality, schemas
from pipelines.engines.recorded.columns import distinct, pick
from pipelines.engines.recorded.ledger import Batch, Ledger
from pipelines.policies import recorded_policy_id

SLICE = 8192  # answers hashed and measured at a time
HUMAN = "human-reference"  # the policy of reference answers that people wrote


def sampling_id(label: str | None) -> bytes:
    """The id of a decoding of which only a label is known."""
    return ids.content_id("sampling", "recorded", label or "")


def unknown(source: str) -> str:
    """The policy of a source's answers whose policy it does not name; never paired by policy."""
    return f"unknown:{source}"


def recorded_answers(
    batch: Batch, now: datetime, progress: Callable[[int, int, str], None] | None = None
) -> pa.Table:
    """The `trajectories` rows of a checked trajectories file."""
    table = batch.table
    prompt, prompt_keys = _ids(table, prompts.prompt_id, "source", "key")
    policy, policy_keys = _ids(table, recorded_policy_id, "source", "policy")
    sampling, sampling_keys = _ids(table, sampling_id, "sampling")
    index = table["sample_index"].to_numpy()
    keys = ids.array(
        ids.content_id("trajectory", policy_keys[y], prompt_keys[x], sampling_keys[s], int(i))
        for x, y, s, i in zip(prompt, policy, sampling, index, strict=True)
    )
    return _table(
        {
            "trajectory_id": keys,
            "prompt_id": pick(prompt_keys, prompt),
            "policy_id": pick(policy_keys, policy),
            "sampling_id": pick(sampling_keys, sampling),
            "sampling": table["sampling"],
            "sample_index": table["sample_index"],
            "text": table["response"],
            "correct": table["is_correct"],
            "licence": table["license"],
        },
        table["finished"],
        now,
        progress,
        table["prompt"] if "prompt" in table.column_names else None,
    )


def _ids(
    table: pa.Table, make: Callable[..., bytes], *columns: str
) -> tuple[np.ndarray, list[bytes]]:
    codes, first = distinct(table, *columns)
    rows = table.select(columns).take(first).to_pylist()
    return codes, [make(*(row[column] for column in columns)) for row in rows]


def _table(
    columns: dict[str, Any],
    finished: pa.ChunkedArray,
    now: datetime,
    progress: Callable[[int, int, str], None] | None = None,
    asked: pa.ChunkedArray | None = None,
) -> pa.Table:
    """Complete the columns of recorded answers with what follows from text and `finished`.

    `asked` are the prompts' texts, null where the row does not give it.
    """
    text = columns["text"]
    rows = len(text)
    hashes: list[bytes] = []
    flags = []
    truncated = pc.fill_null(pc.invert(finished), False).to_numpy()
    for start in range(0, rows, SLICE):
        part = text.slice(start, SLICE)
        hashes += [ids.content_id("text", value) for value in part.to_pylist()]
        prompt = None if asked is None else asked.slice(start, SLICE).cast(pa.string())
        flags.append(quality.flags(part, prompt, truncated[start : start + SLICE]))
        if progress:
            progress(min(start + SLICE, rows), rows, "ingesting answers")
    made = {
        "finish_reason": pc.if_else(finished, "stop", "length"),
        "original_length": pc.utf8_length(text),
        "engine": pa.repeat("recorded", rows),
        "content_hash": ids.array(hashes),
        "flags": pa.chunked_array(flags, schemas.TEXTS),
        "created_at": pa.repeat(pa.scalar(now, schemas.TIME), rows),
    }
    arrays = []
    for field in schemas.TRAJECTORIES.schema:
        values = {**columns, **made}.get(field.name)
        values = pa.nulls(rows, field.type) if values is None else values
        arrays.append(values if values.type == field.type else values.cast(field.type))
    return pa.Table.from_arrays(arrays, schema=schemas.TRAJECTORIES.schema)


class Unresolved(ValueError):
    """A judgement names an answer that is not there: why, and which field says so."""

    def __init__(self, problem: str, reason: str, field: str) -> None:
        super().__init__(problem)
        self.reason, self.field = reason, field


@dataclass(frozen=True)
class Answer:
    """An answer that a judgement names."""

    trajectory_id: bytes
    sample_index: int
    text: str


class Answers:
    """The trajectories by what judgements call them, and those that judgements bring along."""

    def __init__(self, trajectories: pa.Table, judged: Sequence[Batch], ledger: Ledger) -> None:
        wanted = {
            prompts.prompt_id(row["source"], row["key"])
            for batch in judged
            for row in batch.table.group_by(["source", "key"]).aggregate([]).to_pylist()
        }
        names = ["trajectory_id", "prompt_id", "policy_id", "sample_index", "text"]
        held = pa.array(list(wanted), pa.binary(16))
        rows = trajectories.select(names).filter(
            pc.is_in(ids.storage(trajectories["prompt_id"]), held)
        )
        self._keys = ids.storage(rows["trajectory_id"])
        self._indices = rows["sample_index"].to_numpy()
        self._texts = rows["text"]
        self._rows: defaultdict[tuple[bytes, bytes], list[int]] = defaultdict(list)
        columns = (ids.storage(rows[name]).to_pylist() for name in ("prompt_id", "policy_id"))
        for row, cell in enumerate(zip(*columns, strict=True)):
            self._rows[cell].append(row)
        self._cells: dict[tuple[bytes, bytes], list[Answer]] = {}
        self._new: list[dict[str, Any]] = []
        self._ledger = ledger

    def find(self, row: dict[str, Any], suffix: str) -> Answer:
        """The answer that `policy`, `sample_index` and `response` of a judgement name.

        An answer that no trajectory holds yet becomes one, of the policy named.

        Raises:
            Unresolved: neither policy nor response, a response that is nowhere, or another text
                than the trajectory of that policy and sample_index has.
        """
        policy, text = row[f"policy{suffix}"], row[f"response{suffix}"]
        index = row.get(f"sample_index{suffix}")
        if policy is None and text is not None:
            return self._unnamed(row, text)
        cell = self._cell(row, policy) if policy is not None else []
        for answer in cell:
            if index in (None, answer.sample_index) and text in (None, answer.text):
                return answer
        if text is None:
            msg = f"response{suffix} is null and no trajectory is named instead; give one of them"
            raise Unresolved(msg, "null", f"response{suffix}")
        taken = {answer.sample_index for answer in cell}
        if index in taken:
            msg = (
                f"response{suffix} is not what sample {index} of policy {policy!r} answered to "
                f"this prompt; correct sample_index{suffix} or the text"
            )
            raise Unresolved(msg, "conflict", f"response{suffix}")
        return self._bring(
            row, policy, text, max(taken, default=-1) + 1 if index is None else index
        )

    def reference(self, row: dict[str, Any], text: str) -> Answer:
        """A prompt's reference text: the human trajectory that says the same, or an unnamed one."""
        for answer in self._cell(row, HUMAN):
            if answer.text.strip() == text.strip():
                return answer
        return self._unnamed(row, text.strip())

    def policies(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The policies, by source and name, of the answers that judgements brought along."""
        return {(row["source"], row["policy"]): {} for row in self._new}

    def table(self, now: datetime) -> pa.Table:
        """The answers that judgements brought along, as `trajectories` rows."""
        rows = pa.Table.from_pylist(self._new, schema=schemas.TRAJECTORIES.schema)
        finished = pa.chunked_array([pa.nulls(len(rows), schemas.BOOL)])
        return _table(dict(zip(rows.column_names, rows.columns, strict=True)), finished, now)

    def _unnamed(self, row: dict[str, Any], text: str) -> Answer:
        cell = self._cell(row, unknown(row["source"]))
        for answer in cell:
            if answer.text == text:
                return answer
        return self._bring(row, unknown(row["source"]), text, len(cell))

    def _bring(self, row: dict[str, Any], policy: str, text: str, index: int) -> Answer:
        source = row["source"]
        prompt, owner = self._cell_key(row, policy)
        own = ids.content_id("text", text) if policy == unknown(source) else index
        sampling = sampling_id(None)
        key = ids.content_id("trajectory", owner, prompt, sampling, own)
        self._new.append(
            {
                "source": source,
                "policy": policy,
                "trajectory_id": key,
                "prompt_id": prompt,
                "policy_id": owner,
                "sampling_id": sampling,
                "sample_index": index,
                "text": text,
                "licence": row["license"],
            }
        )
        self._ledger.count("in", "answers", source)
        self._ledger.count("out", "answers", source)
        answer = Answer(key, index, text)
        self._cell(row, policy).append(answer)
        return answer

    def _cell_key(self, row: dict[str, Any], policy: str) -> tuple[bytes, bytes]:
        source = row["source"]
        return prompts.prompt_id(source, row["key"]), recorded_policy_id(source, policy)

    def _cell(self, row: dict[str, Any], policy: str) -> list[Answer]:
        """All answers of a policy to the row's prompt."""
        key = self._cell_key(row, policy)
        if key not in self._cells:
            self._cells[key] = [
                Answer(self._keys[at].as_py(), int(self._indices[at]), self._texts[at].as_py())
                for at in self._rows.get(key, ())
            ]
        return self._cells[key]
