"""What the rows name: their prompts, their policies, their samples; contradictions set apart.

The texts themselves are `answers.py`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import policies, prompts, schemas
from pipelines.engines.recorded.columns import distinct
from pipelines.engines.recorded.ledger import Batch, Ledger

Texts = dict[tuple[str, str], str | None]  # (source, prompt key) to the prompt's text
Policies = dict[tuple[str, str], dict[str, Any]]  # (source, name) to what is said of the policy


# --- prompts


def prompts_of(
    batches: dict[str, Batch], split: prompts.SplitSettings, ledger: Ledger
) -> tuple[dict[str, Batch], pa.Table]:
    """Name the prompt of every row in a column `key`, and make the `prompts` table.

    A prompt is known by its source and its `prompt_id`, or by its text where a row gives no id.
    The first text given for an id (the prompts file comes first) is the right one.
    """
    texts: Texts = {}
    batches = {**batches, "prompts": _with_messages(batches["prompts"], ledger)}
    for label in ("prompts", "trajectories", "preferences", "ranked_triples"):
        batches[label] = _learn(batches[label], texts, ledger)
    for label, batch in batches.items():
        batches[label] = _drop_unknown(batch, texts, ledger)
    return batches, _prompts_table(batches["prompts"], texts, split, ledger)


def _with_messages(batch: Batch, ledger: Ledger) -> Batch:
    """Parse `turns` into a column `messages`: the text of a prompt that has no other."""
    turns = [_messages(value) for value in batch.table["turns"].to_pylist()]
    joined = ["\n".join(m["content"] for m in value) if value else None for value in turns]
    prompt = pc.coalesce(batch.table["prompt"].cast(pa.string()), pa.array(joined, pa.string()))
    table = batch.table.drop_columns(["prompt", "turns"]).append_column("prompt", prompt)
    messages = pa.array([value or None for value in turns], schemas.MESSAGES)
    return ledger.reject(
        Batch(batch.label, batch.file, table.append_column("messages", messages)),
        np.array([value is None for value in turns], bool),
        reason="wrong_type",
        field="turns",
        problem="turns is not a JSON list of {{role, content}}, both text; correct or remove it",
    )


def _messages(turns: str | None) -> list[dict[str, str]] | None:
    """The messages, none where there are no turns; None where they cannot be read."""
    try:
        found = json.loads(turns or "[]")
        return [{"role": _text(t["role"]), "content": _content(t["content"])} for t in found]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _content(content: Any) -> str:
    """A turn's text: as it is, or in parts of the type `text`."""
    if not isinstance(content, list):
        return _text(content)
    if any(part["type"] != "text" for part in content):
        raise ValueError
    return "\n".join(_text(part["text"]) for part in content)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _learn(batch: Batch, texts: Texts, ledger: Ledger) -> Batch:
    columns = ["source", "prompt_id", "prompt"]
    codes, first = distinct(batch.table, *columns)
    keys: list[str | None] = []
    clash: list[bool] = []
    for row in batch.table.select(columns).take(first).to_pylist():
        source, key, text = row["source"], row["prompt_id"], row["prompt"]
        if key is None and text is not None:
            key = prompts.text_key(text)
        keys.append(key)
        if key is not None and texts.get((source, key)) is None:
            texts[source, key] = text
        clash.append(text is not None and text != texts[source, key])
    column = pa.array(keys, pa.string()).take(pa.array(codes))
    batch = Batch(batch.label, batch.file, batch.table.append_column("key", column))
    nameless = column.is_null().to_numpy(zero_copy_only=False)
    wrong = np.array(clash, bool)[codes]
    batch = ledger.reject(
        batch,
        nameless,
        reason="missing",
        field="prompt",
        problem="neither prompt nor prompt_id; give one of them",
    )
    return ledger.reject(
        batch,
        wrong[~nameless],
        reason="conflict",
        field="prompt",
        problem="prompt_id {prompt_id!r} already has another text; correct one of the two",
    )


def _drop_unknown(batch: Batch, texts: Texts, ledger: Ledger) -> Batch:
    codes, first = distinct(batch.table, "source", "key")
    rows = batch.table.select(["source", "key"]).take(first).to_pylist()
    unknown = np.array([texts[row["source"], row["key"]] is None for row in rows], bool)
    return ledger.reject(
        batch,
        unknown[codes],
        reason="unknown_prompt",
        field="prompt_id",
        problem="no file gives the text of prompt {prompt_id!r}; add it as column prompt",
    )


def _prompts_table(
    batch: Batch, texts: Texts, split: prompts.SplitSettings, ledger: Ledger
) -> pa.Table:
    """All prompts with a text; those that only other files name count as rows in, too."""
    batch = ledger.reject(
        batch,
        repeated(batch.table, "source", "key"),
        reason="duplicate",
        field="prompt_id",
        problem="prompt {key!r} occurs before; remove one of the rows",
    )
    batch = ledger.one_of(batch, "kind", schemas.PROMPT_KINDS)
    listed = {(row["source"], row["key"]): row for row in batch.table.to_pylist()}
    rows = []
    for (source, key), text in texts.items():
        if text is None:
            continue
        row = listed.get((source, key))
        if row is None:
            ledger.count("in", "prompts", source)
            row = {}
        ledger.count("out", "prompts", source)
        own = {"source": source, "source_key": key, "text": text, "licence": row.get("license")}
        rows.append({**row, **own})
    return prompts.prompts_table(rows, split)


# --- policies


def policies_of(batch: Batch, ledger: Ledger) -> tuple[Batch, Policies]:
    """What is said of each policy; rows that say otherwise than earlier ones are set apart."""
    found: Policies = {}
    for name in ("policy_group", "family", "lineage_step"):
        columns = ["source", "policy", name]
        codes, first = distinct(batch.table, *columns)
        clash = []
        for row in batch.table.select(columns).take(first).to_pylist():
            said = found.setdefault((row["source"], row["policy"]), {})
            value = row[name]
            clash.append(value is not None and said.setdefault(name, value) != value)
        batch = ledger.reject(
            batch,
            np.array(clash, bool)[codes],
            reason="conflict",
            field=name,
            problem=f"policy {{policy!r}} already has another {name}; a policy has one",
        )
    columns = ["source", "policy", "license"]
    _, first = distinct(batch.table, *columns)
    rows = batch.table.select(columns).take(first).to_pylist()
    for row in sorted(rows, key=lambda row: row["license"] or ""):
        said = found[row["source"], row["policy"]]
        said["licence"] = "; ".join(filter(None, (said.get("licence"), row["license"]))) or None
    return batch, found


def policies_table(found: Policies, split: prompts.SplitSettings) -> pa.Table:
    """The `policies` rows: a policy without a group is one of its own, also as a family.

    A group's name means the same group in every source, so that `gpt-4` is held out everywhere
    or nowhere.
    """
    rows = []
    for (source, name), said in found.items():
        group = said.get("policy_group", name)
        rows.append(
            {
                "policy_id": policies.recorded_policy_id(source, name),
                "name": name,
                "policy_group": group,
                "family": said.get("family", group),
                "kind": "recorded",
                "lineage_step": said.get("lineage_step"),
                "source": source,
                "engine": "recorded",
                "licence": said.get("licence"),
                "split": prompts.side("policy", group, split),
            }
        )
    return pa.Table.from_pylist(rows, schema=schemas.POLICIES.schema)


# --- samples


def number_samples(batch: Batch, ledger: Ledger) -> Batch:
    """Give a running `sample_index` per prompt and policy where none is given; keys are unique.

    A blank `sampling` is none.
    """
    names = batch.table["sampling"].cast(pa.string())
    names = pc.if_else(pc.equal(names, ""), None, names).dictionary_encode()
    place = batch.table.schema.get_field_index("sampling")
    batch = Batch(batch.label, batch.file, batch.table.set_column(place, "sampling", names))
    cell, _ = distinct(batch.table, "source", "key", "policy")
    order = np.argsort(cell, kind="stable")
    starts = np.searchsorted(cell[order], cell[order])
    running = np.empty(len(cell), np.int32)
    running[order] = np.arange(len(cell)) - starts
    position = batch.table.schema.get_field_index("sample_index")
    index = pc.coalesce(batch.table["sample_index"], pa.array(running))
    table = batch.table.set_column(position, "sample_index", index)
    batch = ledger.reject(
        Batch(batch.label, batch.file, table),
        pc.less(index, 0).to_numpy(),
        reason="wrong_value",
        field="sample_index",
        problem="sample_index is {sample_index}; it counts from 0",
    )
    return ledger.reject(
        batch,
        repeated(batch.table, "source", "key", "policy", "sampling", "sample_index"),
        reason="duplicate",
        field="sample_index",
        problem="sample {sample_index} of policy {policy!r} for prompt {key!r} occurs before",
    )


def repeated(table: pa.Table, *columns: str) -> np.ndarray:
    """Whether an earlier row has the same values, (n,)."""
    _, first = distinct(table, *columns)
    mask = np.ones(table.num_rows, bool)
    mask[first] = False
    return mask
