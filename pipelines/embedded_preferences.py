"""Judgements of the embedded pool: right against wrong answers, found by checking them.

Chosen and rejected name their values in one form and are about equally long, and of any two
policies each is preferred to the other equally often, so that neither length nor style tells them
apart. The reference is of another policy group. Where judgements are evaluated it names the right
value in its other form, so that its words do not tell either; where they are trained on it may name
it in any, for the equal word is what a model finds first and the equal meaning what it goes on to.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import pyarrow as pa
from pydantic import Field

from pipelines import ids, schemas
from pipelines.embedded_words import by_question, stated
from pipelines.settings import Settings

ANNOTATOR = "embedded-check"


class PreferenceSettings(Settings):
    """How many judgements are made, and how alike chosen and rejected must be."""

    length_tolerance: float = Field(
        default=0.12, ge=0, le=1, description="difference of lengths, as a share of the longer"
    )
    train_any_form: bool = Field(
        default=True, description="whether references on the train side may share the chosen's form"
    )
    per_answer: int = Field(default=6, ge=1, description="judgements an answer may win or lose")
    seed: int = 0


class _Answer(NamedTuple):
    key: bytes
    policy: bytes
    group: str
    side: str
    length: int
    value: int
    form: int


class _Judgement(NamedTuple):
    prompt: bytes
    reference: _Answer
    chosen: _Answer
    rejected: _Answer


def preferences(
    trajectories: pa.Table, prompts: pa.Table, settings: PreferenceSettings | None = None
) -> pa.Table:
    """The `preferences` table of the world's instructions.

    Args:
        trajectories: columns of schemas.TRAJECTORIES, and `policy_group` and `policy_split` of
            their policies, in any order.
        prompts: rows of schemas.PROMPTS; those that have no right answer are passed over.
        settings: how many, and how alike.

    Returns:
        Rows with schemas.PREFERENCES; the three answers of each are of policies on one side.
    """
    settings = settings or PreferenceSettings()
    asked = {
        row["prompt_id"].bytes: (row, fact)
        for row in prompts.select(["prompt_id", "text", "category", "split"]).to_pylist()
        if (fact := by_question().get(row["text"])) is not None
    }
    answers: dict[tuple[bytes, str], list[_Answer]] = defaultdict(list)
    columns = ["trajectory_id", "prompt_id", "policy_id", "policy_group", "policy_split", "text"]
    for row in trajectories.select(columns).to_pylist():
        prompt = row["prompt_id"].bytes
        named = set(stated(asked[prompt][1].type, row["text"])) if prompt in asked else ()
        if len(named) == 1:  # one value, in one form
            answers[prompt, row["policy_split"]].append(
                _Answer(
                    row["trajectory_id"].bytes,
                    row["policy_id"].bytes,
                    row["policy_group"],
                    row["policy_split"],
                    len(row["text"]),
                    *next(iter(named)),
                )
            )
    found = [
        judgement
        for (prompt, side), given in sorted(answers.items())
        for judgement in _judge(
            prompt,
            given,
            asked[prompt][1].value,
            settings,
            any_form=settings.train_any_form and asked[prompt][0]["split"] == side == "train",
        )
    ]
    rows = []
    for prompt, *three in _balanced(found, lambda j: asked[j.prompt][0]["split"]):
        row = asked[prompt][0]
        reference, chosen, rejected = (answer.key for answer in three)
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
    prompt: bytes,
    answers: list[_Answer],
    right: int,
    settings: PreferenceSettings,
    *,
    any_form: bool,
) -> Iterator[_Judgement]:
    """The judgements of one prompt, in an order that only ids decide."""

    def order(*answers: _Answer) -> bytes:
        return ids.content_id("judgement", settings.seed, *(answer.key for answer in answers))

    used: Counter[bytes] = Counter()
    good = [answer for answer in answers if answer.value == right]
    bad = [answer for answer in answers if answer.value != right]
    for chosen, rejected in sorted(product(good, bad), key=lambda pair: order(*pair)):
        shorter, longer = sorted((chosen.length, rejected.length))
        references = [
            answer
            for answer in good
            if answer.group not in (chosen.group, rejected.group)
            and (any_form or answer.form != chosen.form)
        ]
        if (
            references
            and chosen.form == rejected.form
            and shorter >= (1 - settings.length_tolerance) * longer
            and max(used[chosen.key], used[rejected.key]) < settings.per_answer
        ):
            used.update((chosen.key, rejected.key))
            reference = min(references, key=lambda r: order(r, chosen, rejected))
            yield _Judgement(prompt, reference, chosen, rejected)


def _balanced(found: list[_Judgement], split: Callable[[_Judgement], str]) -> list[_Judgement]:
    """As many judgements for one policy over another as for the other over the one."""
    by_pair: dict[tuple[bytes, bytes, str], list[_Judgement]] = defaultdict(list)
    for judgement in found:
        pair = judgement.chosen.policy, judgement.rejected.policy
        by_pair[*pair, split(judgement)].append(judgement)
    return [
        judgement
        for (one, other, side), judgements in by_pair.items()
        for judgement in judgements[: len(by_pair.get((other, one, side), []))]
    ]
