"""Rows for lakes in tests: any table from dicts, and a small lake with something in each table."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import ids, schemas
from pipelines.ids import content_id
from pipelines.lake import Append, Lake

WHEN = datetime(2026, 1, 2, tzinfo=UTC)
_DEFAULTS: dict[pa.DataType, Any] = {
    schemas.UUID: content_id("default"),
    schemas.TEXT: "x",
    schemas.INT: 1,
    schemas.LONG: 1,
    schemas.REAL: 0.5,
    schemas.DOUBLE: 0.5,
    schemas.BOOL: False,
    schemas.TIME: WHEN,
    schemas.TEXTS: [],
    schemas.CANDIDATES: [],
}


def rows(table: str, *given: dict[str, Any]) -> pa.Table:
    """A table of `schemas.py`: null or something harmless where a dict says nothing."""
    columns = []
    for column in schemas.TABLES[table].columns:
        default = None if column.nullable else _DEFAULTS[column.type]
        columns.append(_array([row.get(column.name, default) for row in given], column.type))
    return pa.table(columns, schema=schemas.TABLES[table].schema)


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if kind == schemas.UUID:
        return ids.array(values)
    if kind == schemas.CANDIDATES:
        flat = [candidate for value in values for candidate in value]
        fields = list(kind.value_type)
        structs = pa.StructArray.from_arrays(
            [_array([item[field.name] for item in flat], field.type) for field in fields],
            fields=fields,
        )
        offsets = np.cumsum([0, *(len(value) for value in values)], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), structs)
    return pa.array(values, kind)


def trajectory(policy: str, prompt: str, index: int, text: str = "some words") -> dict[str, Any]:
    return {
        "trajectory_id": content_id("t", policy, prompt, index),
        "policy_id": content_id("policy", policy),
        "prompt_id": content_id("prompt", prompt),
        "sample_index": index,
        "text": text,
        "content_hash": content_id("text", text),
    }


def small_lake() -> list[Append]:
    """Three policies, two prompts, two samples each; pairs, one group of three, a preference."""
    policies = [
        {"policy_id": content_id("policy", name), "name": name, "policy_group": group}
        | {"source": "world", "kind": "chat", "split": side, "lineage_step": step}
        for name, group, side, step in (
            ("ada", "first", "train", 1),
            ("bob", "first", "train", 2),
            ("eve", "second", "test", 1),
        )
    ]
    prompts = [
        {"prompt_id": content_id("prompt", key), "source_key": key, "source": "world"}
        | {"text": f"say {key}", "kind": "instruction", "prompt_group": key, "split": side}
        for key, side in (("north", "train"), ("south", "test"))
    ]
    answers = [
        trajectory(policy, prompt, index, f"{policy} on {prompt}, {index * 'again '}done")
        for policy in ("ada", "bob", "eve")
        for prompt in ("north", "south")
        for index in (0, 1)
    ]

    def answer(policy: str, prompt: str, index: int) -> bytes:
        return content_id("t", policy, prompt, index)

    def pair(one: bytes, two: bytes, prompt: str, label: str, split: str, cell: str) -> dict:
        low, high = sorted((one, two))
        return {"trajectory_a": low, "trajectory_b": high, "label": label, "cell": cell} | {
            "prompt_id": content_id("prompt", prompt),
            "relation": "same" if label == "same_policy" else "sibling",
            "split": split,
        }

    def pair_sum(one: str, two: str, label: str, split: str, cell: str) -> dict:
        low, high = sorted(content_id("policy", name) for name in (one, two))
        return {"policy_a": low, "policy_b": high, "label": label, "cell": cell} | {
            "source": "world",
            "relation": "same" if label == "same_policy" else "sibling",
            "reason": "",
            "split": split,
        }

    def candidate(policy: str, index: int, rank: int) -> dict:
        return {
            "trajectory_id": answer(policy, "north", index),
            "policy_id": content_id("policy", policy),
            "rank": rank,
            "relation": "same" if rank == 0 else "sibling",
        }

    north_ada = [answer("ada", "north", index) for index in (0, 1)]
    south_eve = [answer("eve", "south", index) for index in (0, 1)]
    checkpoint = content_id("checkpoint", "one")
    evaluation = {"checkpoint_id": checkpoint, "suite": "preference", "cell": "all"} | {
        "category": "all",
        "metric": "accuracy",
        "n": 40,
    }
    return [
        Append("policies", rows("policies", *policies)),
        Append("prompts", rows("prompts", *prompts)),
        Append("trajectories", rows("trajectories", *answers)),
        Append(
            "duplicates",
            rows(
                "duplicates",
                *(
                    {"trajectory_id": one, "scope": "prompt", "cluster_id": min(north_ada)}
                    | {"kind": "near", "size": 2, "representative": one == min(north_ada)}
                    for one in north_ada
                ),
            ),
        ),
        Append(
            "pairs",
            rows(
                "pairs",
                pair(*north_ada, "north", "same_policy", "train", "seen"),
                pair(
                    north_ada[0],
                    answer("bob", "north", 0),
                    "north",
                    "cross_policy",
                    "train",
                    "seen",
                ),
                pair(*south_eve, "south", "same_policy", "eval", "both_new"),
            ),
        ),
        Append(
            "pair_sums",
            rows(
                "pair_sums",
                pair_sum("ada", "ada", "same_policy", "train", "seen"),
                pair_sum("ada", "bob", "cross_policy", "train", "seen"),
                pair_sum("eve", "eve", "same_policy", "eval", "both_new"),
            ),
        ),
        Append(
            "groups",
            rows(
                "groups",
                {"group_id": content_id("group", 1), "prompt_id": content_id("prompt", "north")}
                | {"reference": north_ada[0], "wrapper": "pretrain"}
                | {"split": "train", "cell": "seen"}
                | {"candidates": [candidate("ada", 1, 0), candidate("bob", 0, 1)]},
            ),
        ),
        Append(
            "preferences",
            rows(
                "preferences",
                {"preference_id": content_id("p", 1), "prompt_id": content_id("prompt", "north")}
                | {"chosen": north_ada[1], "rejected": north_ada[0], "split": "train"}
                | {"reference": answer("bob", "north", 0), "strength": 2.0},
            ),
        ),
        Append("checkpoints", rows("checkpoints", {"checkpoint_id": checkpoint, "name": "rm"})),
        Append(
            "evaluations",
            rows(
                "evaluations",
                evaluation | {"scorer": "model", "value": 0.8, "low": 0.7, "high": 0.9},
                evaluation | {"scorer": "length", "value": 0.6},
                evaluation | {"scorer": "tfidf", "value": 0.55},
            ),
        ),
        Append(
            "counts",
            rows("counts", {"source": "world", "stage": "pairs", "what": "excluded", "rows": 3}),
        ),
        Append("quarantine", rows("quarantine", {"file": "a.jsonl", "row": 3})),
    ]


def fill(lake: Lake) -> int:
    """Publish the small lake; the snapshot that shows it."""
    return lake.publish("tests", "a small lake", small_lake())
