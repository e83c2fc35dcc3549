"""Judgements between two answers: sides resolved, ties and give-aways excluded and counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipelines import ids, prompts, schemas
from pipelines.engines.recorded.answers import Answer, Answers, Unresolved
from pipelines.engines.recorded.ledger import Batch, Ledger, excerpt

ANNOTATOR_TYPES = ("human", "llm", "verifier")
CHOSEN_REJECTED = {"a": ("_a", "_b"), "b": ("_b", "_a"), "tie": ("_a", "_b")}


def preferences_table(
    judged: Sequence[Batch], prompt_rows: pa.Table, answers: Answers, ledger: Ledger
) -> pa.Table:
    """The `preferences` rows of preferences and ranked triples.

    A preference has the prompt's reference text as its reference, where there is one; a triple
    its best answer. Left out and counted: ties, two sides of one text, a reference that says what
    a side says (up to case and white space: it would give the answer away), and repeats.
    """
    keys = ids.storage(prompt_rows["prompt_id"]).to_pylist()
    said = prompt_rows.select(["reference", "category", "split"]).to_pylist()
    about = dict(zip(keys, said, strict=True))
    found: dict[bytes, dict[str, Any]] = {}
    for batch in judged:
        for row in _checked(batch, ledger):
            prompt = prompts.prompt_id(row["source"], row["key"])
            try:
                chosen, rejected, reference = _sides(row, answers)
            except Unresolved as error:
                ledger.bad(
                    batch,
                    row["source"],
                    row["row"],
                    reason=error.reason,
                    field=error.field,
                    problem=str(error),
                    raw=excerpt(row),
                )
                continue
            text = reference.text if reference else (about[prompt]["reference"] or "").strip()
            reason = _excluded(row, chosen.text, rejected.text, text)
            if text and not reason:
                reference = reference or answers.reference(row, text)
            target = reference.trajectory_id if reference else None
            sides = chosen.trajectory_id, rejected.trajectory_id
            annotator = row["annotator"] or "unknown"
            key = ids.content_id("preference", target, *sides, annotator)
            if reason or key in found:
                ledger.count("excluded", batch.label, row["source"], reason or "repeated")
                continue
            ledger.count("out", batch.label, row["source"])
            found[key] = {
                "preference_id": key,
                "prompt_id": prompt,
                "reference": target,
                "chosen": sides[0],
                "rejected": sides[1],
                "annotator": annotator,
                "annotator_type": row["annotator_type"] or "human",
                "category": row["category"] or about[prompt]["category"],
                "strength": row.get("strength"),
                "split": "train" if about[prompt]["split"] == "train" else "eval",
            }
    return pa.Table.from_pylist(list(found.values()), schema=schemas.PREFERENCES.schema)


def _checked(batch: Batch, ledger: Ledger) -> Iterator[dict[str, Any]]:
    batch = ledger.one_of(batch, "annotator_type", ANNOTATOR_TYPES)
    if "preference" in batch.table.column_names:
        batch = ledger.one_of(batch, "preference", tuple(CHOSEN_REJECTED))
    for part in batch.table.to_batches(max_chunksize=4096):
        yield from part.to_pylist()


def _sides(row: dict[str, Any], answers: Answers) -> tuple[Answer, Answer, Answer | None]:
    """Chosen and rejected of a row, and the reference where the row holds it."""
    if "preference" not in row:
        best, middle, worst = (answers.find(row, suffix) for suffix in ("_1", "_2", "_3"))
        return middle, worst, best
    chosen, rejected = (answers.find(row, suffix) for suffix in CHOSEN_REJECTED[row["preference"]])
    return chosen, rejected, None


def _excluded(row: dict[str, Any], chosen: str, rejected: str, reference: str) -> str | None:
    """Why a judgement is no preference, if it is none."""
    if row.get("preference") == "tie":
        return "tie"
    if chosen == rejected:
        return "same_text"
    if reference and _plain(reference) == _plain(chosen):
        return "reference_is_chosen"
    if reference and _plain(reference) == _plain(rejected):
        return "reference_is_rejected"
    return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
