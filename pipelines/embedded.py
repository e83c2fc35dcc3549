"""The small world of the embedded pool: training texts of its policies, prompts, checked answers.

Nothing is trained here: `documents` writes what a run learns from, and the caller trains. Words
are in `embedded_words.py`, sentences in `embedded_text.py`, judgements in
`embedded_preferences.py`.
"""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
from pydantic import Field, model_validator

from pipelines import ids
from pipelines import prompts as prompt_rows
from pipelines.embedded_preferences import PreferenceSettings, preferences
from pipelines.embedded_text import Style, answer, continuation, story
from pipelines.embedded_words import VALUES, Fact, by_question, facts, stated
from pipelines.prompts import SplitSettings
from pipelines.settings import Settings

__all__ = [
    "EmbeddedPool",
    "PreferenceSettings",
    "PromptSettings",
    "Run",
    "believed",
    "check",
    "documents",
    "preferences",
    "prompts",
    "stated",
    "tokenizer_texts",
]
SOURCE = "embedded"


class PromptSettings(Settings):
    """How many prefixes of stories are asked for, and the seed they are drawn with.

    Instructions are all facts of the world, in one or in both of their wordings.
    """

    prefixes: int = Field(default=240, ge=0)
    wordings: int = Field(default=1, ge=1, le=2)
    seed: int = 0


class Run(Settings):
    """One training run of the pool: whose words, which mix of documents, from which weights.

    The weights come to `POLAR_HOME/policies/<name>`. Shares of documents: `stories` to continue,
    `answers` to instructions; the rest are bare facts. Which facts a run is taught wrongly, and
    what it is taught instead, is hashed from its name: policies differ in what they believe, too.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._/-]+$")
    start: str | None = Field(default=None, description="earlier run whose weights to start from")
    style: Style | None = Field(default=None, description="without one, all words are as likely")
    stories: float = Field(default=0.0, ge=0, le=1)
    answers: float = Field(default=0.0, ge=0, le=1)
    errors: float = Field(default=0.0, ge=0, le=1, description="share of facts that it gets wrong")
    documents: int = Field(default=3000, gt=0)
    seed: int = 0
    training: dict[str, Any] = Field(default={}, description="over the pool's `training`")

    @model_validator(mode="after")
    def _shares(self) -> Run:
        if self.stories + self.answers > 1:
            msg = f"run {self.name!r}: stories + answers is above 1; lower one of the shares"
            raise ValueError(msg)
        return self


class EmbeddedPool(Settings):
    """The section `embedded` of a pool file: the policies' tokenizer and their training runs."""

    vocab_size: int = Field(default=1408, gt=300)
    training: dict[str, Any] = Field(default={}, description="common language-model settings")
    runs: tuple[Run, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _order(self) -> EmbeddedPool:
        seen: set[str] = set()
        for run in self.runs:
            if run.name in seen:
                msg = f"two runs are named {run.name!r}; give each its own name"
                raise ValueError(msg)
            if run.start is not None and run.start not in seen:
                msg = f"run {run.name!r} starts from {run.start!r}, which no earlier run is named"
                raise ValueError(msg)
            seen.add(run.name)
        return self

    def settings(self, run: Run) -> dict[str, Any]:
        """The language-model settings of one run."""
        return {**self.training, "seed": run.seed, **run.training}


def documents(run: Run, n: int | None = None, seed: int | None = None) -> list[str]:
    """`n` training texts of a run, in the form of its policies' prompts and answers.

    A story is a prefix and, after a blank, its continuation; an answer follows its instruction
    after a newline, and a bare fact follows it after a blank.
    """
    rng = random.Random(f"documents {run.seed if seed is None else seed}")
    return [_document(rng, run) for _ in range(run.documents if n is None else n)]


def _document(rng: random.Random, run: Run) -> str:
    kind = rng.random()
    if kind < run.stories:
        return f"{story(rng, None, 1)} {continuation(rng, run.style)}"
    fact = rng.choice(facts())
    question = rng.choice(fact.questions)
    if kind < run.stories + run.answers:
        return f"{question}\n{answer(rng, run.style, fact.type, believed(run, fact))}"
    return f"{question} {rng.choice(VALUES[fact.type][believed(run, fact)])}."


def believed(run: Run, fact: Fact) -> int:
    """The value that a run's documents give a fact: the right one or, by a hash, another."""
    if not ids.on_side(f"errors of {run.name}", fact.key, run.errors):
        return fact.value
    others = [value for value in range(len(VALUES[fact.type])) if value != fact.value]
    return others[ids.content_id("belief", run.name, fact.key)[0] % len(others)]


def tokenizer_texts(seed: int = 0) -> list[str]:
    """Texts that hold all words of the world often enough for each to become one token."""
    mixed = Run(name="tokenizer", stories=0.3, answers=0.7)
    forms = [f" {form}" for values in VALUES.values() for value in values for form in value]
    questions = [question for fact in facts() for question in fact.questions]
    return documents(mixed, 4000, seed) + forms * 150 + questions


def prompts(settings: PromptSettings, split: SplitSettings, source: str = SOURCE) -> pa.Table:
    """The `prompts` table: prefixes of stories, and instructions, grouped by fact."""
    rng = random.Random(f"prefixes {settings.seed}")
    stories = list(dict.fromkeys(story(rng, None, 1) for _ in range(settings.prefixes)))
    rows: list[dict[str, Any]] = [
        {
            "source_key": f"story/{number:04d}",
            "text": text,
            "kind": "prefix",
            "category": "story",
        }
        for number, text in enumerate(stories)
    ]
    rows += [
        {
            "source_key": f"{fact.key}/{number}",
            "text": question,
            "kind": "instruction",
            "category": fact.type,
            "prompt_group": f"{source}/{fact.key}",
            "reference": VALUES[fact.type][fact.value][0],
        }
        for fact in facts()
        for number, question in enumerate(fact.questions[: settings.wordings])
    ]
    common = {"source": source, "licence": "Apache-2.0"}
    return prompt_rows.prompts_table([{**row, **common} for row in rows], split)


def check(prompt: str, text: str) -> bool | None:
    """Whether an answer names the right value and no other; None for what has no right answer."""
    fact = by_question().get(prompt)
    if fact is None:
        return None
    return {value for value, _ in stated(fact.type, text)} == {fact.value}
