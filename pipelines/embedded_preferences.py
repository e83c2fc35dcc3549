"""Judgements of the embedded pool: right against wrong answers, found by checking them.

The chosen and the rejected answer come from one policy, name their value in one form and are about
equally long, so that neither style nor length tells them apart; the reference names the right value
in its other form, so that no word of it does either.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import product
from typing import Any, NamedTuple

import pyarrow as pa
from pydantic import Field

from pipelines import ids, schemas
from pipelines.embedded_words import by_question, stated
from pipelines.settings import Settings

ANNOTATOR = "embedded-check"


class PreferenceSettings(Settings):
    """How many judgements are made, and how alike chosen and rejected must be."""

    length_tolerance: float = Field(
        default=0.08, ge=0, le=1, description="difference of lengths, as a share of the longer"
    )
    references: int = Field(default=2, ge=1, description="at most, for one chosen and rejected")
    per_answer: int = Field(
        default=2, ge=1, description="judgements that one answer may win or lose"
    )
    seed: int = 0


class _Answer(NamedTuple):
    key: bytes
    policy: bytes
    group: str
    text: str
    value: int
    form: int


def preferences(
    trajectories: pa.Table, prompts: pa.Table, settings: PreferenceSettings | None = None
) -> pa.Table:
    """The `preferences` table of the world's instructions.

    Args:
        trajectories: columns of schemas.TRAJECTORIES and `policy_group`, in any order.
        prompts: rows of schemas.PROMPTS; those that have no right answer are passed over.
        settings: how many, and how alike.

    Returns:
        Rows with schemas.PREFERENCES; reference, chosen and rejected are of one policy group, so
        that they are on one side of the split.
    """
    settings = settings or PreferenceSettings()
    asked = {
        row["prompt_id"].bytes: (row, fact)
        for row in prompts.select(["prompt_id", "text", "category", "split"]).to_pylist()
        if (fact := by_question().get(row["text"])) is not None
    }
    answers: dict[bytes, list[_Answer]] = defaultdict(list)
    columns = ["trajectory_id", "prompt_id", "policy_id", "policy_group", "text"]
    for row in trajectories.select(columns).to_pylist():
        prompt = row["prompt_id"].bytes
        if prompt not in asked:
            continue
        named = stated(asked[prompt][1].type, row["text"])
        if len(set(named)) == 1:  # one value, in one form
            key, policy = row["trajectory_id"].bytes, row["policy_id"].bytes
            answers[prompt].append(
                _Answer(key, policy, row["policy_group"], row["text"], *named[0])
            )
    rows: list[dict[str, Any]] = []
    for prompt in sorted(answers):
        row, fact = asked[prompt]
        for reference, chosen, rejected in _judge(answers[prompt], fact.value, settings):
            rows.append(
                {
                    "preference_id": ids.content_id(
                        "preference", reference, chosen, rejected, ANNOTATOR
                    ),
                    "prompt_id": prompt,
                    "reference": reference,
                    "chosen": chosen,
                    "rejected": rejected,
                    "annotator": ANNOTATOR,
                    "annotator_type": "verifier",
                    "category": row["category"],
                    "strength": None,
                    "split": "train" if row["split"] == "train" else "eval",
                }
            )
    return pa.Table.from_arrays(
        [
            ids.array(row[field.name] for row in rows)
            if field.type == schemas.UUID
            else pa.array([row[field.name] for row in rows], field.type)
            for field in schemas.PREFERENCES.schema
        ],
        schema=schemas.PREFERENCES.schema,
    )


def _judge(
    answers: list[_Answer], right: int, settings: PreferenceSettings
) -> list[tuple[bytes, bytes, bytes]]:
    """(reference, chosen, rejected) of one prompt, in an order that only ids decide."""

    def order(*keys: bytes) -> bytes:
        return ids.content_id("preference order", settings.seed, *keys)

    used: Counter[bytes] = Counter()
    found = []
    good = [a for a in answers if a.value == right]
    bad = [a for a in answers if a.value != right]
    for chosen, rejected in sorted(product(good, bad), key=lambda p: order(p[0].key, p[1].key)):
        lengths = sorted((len(chosen.text), len(rejected.text)))
        if (
            chosen.policy != rejected.policy
            or chosen.form != rejected.form
            or lengths[0] < (1 - settings.length_tolerance) * lengths[1]
            or max(used[chosen.key], used[rejected.key]) >= settings.per_answer
        ):
            continue
        references = [a for a in good if a.form != chosen.form and a.group == chosen.group]
        references.sort(key=lambda a: order(a.key, chosen.key, rejected.key))
        for reference in references[: settings.references]:
            found.append((reference.key, chosen.key, rejected.key))
        if references:
            used.update((chosen.key, rejected.key))
    return found
