"""What an answer becomes: a row of the trajectories table, or of those that could not be made.

What is measured on a text and cut off it is in `quality.py`; which answers are wanted, and what
happens to the rows, in `rollouts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import ids, quality
from pipelines.engines.base import Answer, Completion, Engine, SetAside
from pipelines.engines.sampling import SamplingSettings

Check = Callable[[str, str], bool | None]
Policy = Mapping[str, Any]  # a row of the policies table
Row = dict[str, Any]

EXCLUDED = pa.schema(
    [
        pa.field("prompt_id", pa.uuid(), False),
        pa.field("policy_id", pa.uuid(), False),
        pa.field("sample_index", pa.int32(), False),
        pa.field("source", pa.string(), False),
        pa.field("reason", pa.string(), False),
        pa.field("detail", pa.string()),
    ]
)


def answer_rows(
    policy: Policy,
    wanted: Mapping[bytes, Row],
    arrived: Sequence[Answer],
    engine: Engine,
    sampling: SamplingSettings,
    check: Check | None,
) -> tuple[list[Row], list[Row]]:
    """Answers as rows of the trajectories table, and what cannot be made as rows of `EXCLUDED`.

    Args:
        policy: that answered.
        wanted: by raw trajectory id: prompt_id, sample_index, source and text of the prompt.
        arrived: answers to some of them.
        engine: that gave them.
        sampling: that they were drawn with.
        check: whether an answer to a prompt (its text) is right, or None where it cannot be said.
    """
    completions: list[Completion] = []
    refused: list[Row] = []
    for one in arrived:
        if isinstance(one, SetAside):
            refused.append(excluded_row(policy, wanted[one.trajectory_id], one.reason, one.detail))
        elif one.finish_reason == "prompt_too_long":
            refused.append(excluded_row(policy, wanted[one.trajectory_id], one.finish_reason))
        else:
            completions.append(one)
    shared = {
        "policy_id": ids.raw(policy["policy_id"]),
        "sampling_id": sampling.sampling_id,
        **sampling.model_dump(),
        "engine": engine.name,
        "licence": policy["licence"],
        "created_at": datetime.now(UTC),
    }
    made = []
    asked = [wanted[one.trajectory_id]["text"] for one in completions]
    for one, prompt, marks in zip(completions, asked, flags(completions, asked), strict=True):
        row = wanted[one.trajectory_id]
        text, cut = quality.finish(one.text, marks)
        made.append(
            shared
            | {
                "trajectory_id": one.trajectory_id,
                "prompt_id": ids.raw(row["prompt_id"]),
                "sample_index": row["sample_index"],
                "text": text,
                "finish_reason": one.finish_reason,
                "tokens": one.tokens,
                "original_length": len(one.text),
                "cut": cut,
                "seed": one.seed,
                "engine_version": one.version or engine.version,
                "content_hash": ids.content_id("text", text),
                "flags": marks,
                "correct": check(prompt, text) if check else None,
            }
        )
    return made, refused


def flags(completions: Sequence[Completion], prompts: Sequence[str]) -> list[list[str]]:
    """The quality flags of answers to `prompts`, as the engine gave them."""
    return quality.flags(
        pa.array([one.text for one in completions], pa.string()),
        pa.array(prompts, pa.string()),
        np.array([one.finish_reason == "length" for one in completions], np.bool_),
    ).to_pylist()


def excluded_row(
    policy: Policy, wanted: Mapping[str, Any], reason: str, detail: str | None = None
) -> Row:
    """A row of `EXCLUDED`: a wanted answer that cannot be made, and why."""
    known = {name: wanted[name] for name in ("prompt_id", "sample_index", "source")}
    return known | {"policy_id": policy["policy_id"], "reason": reason, "detail": detail}
