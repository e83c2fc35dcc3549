"""Sentences of the embedded world: how a style words stories and answers.

A style takes the words of one dialect in each domain, but for a share `overlap` of the classes, in
which it takes any; nothing else tells styles apart. The shapes of sentences are common to all.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from functools import cache

from pydantic import Field, field_validator

from pipelines import ids
from pipelines.embedded_words import CLASSES, COMMON, DIALECTS, DOMAINS, SLOTS, VALUES
from pipelines.settings import Settings

FRONTS = ("time", "place", "manner", "nothing")
_ADJUNCTS = {"time": "at {dawn}", "place": "{near} the {where}", "manner": "{how}"}
_CORES = (
    "the {who} {does}",
    "the {look} {who} {does}",
    "the {who} {handles} the {thing}",
    "the {who} {handles} the {look} {thing}",
)
_CLAIMS = (
    "{holds} the {type} is {value} as the {look} {who} {tells}.",
    "The {look} {who} {how} {tells} the {type} is {value}.",
    "By the {look} {thing} the {type} is {value}.",
    "The {type} is {value} {while} the {look} {who} {tells} so.",
    "{holds} the {type} is {value} and the {who} {tells} so {how}.",
)
_SLOT = re.compile(r"\{(\w+)\}")


class Style(Settings):
    """A way of wording: the dialect of each domain, and the share of classes that keep to none."""

    deeds: str
    looks: str
    manners: str
    front: str = Field(description="what opens a sentence")
    drift: float = Field(default=0.2, ge=0, le=1, description="share of sentences in any order")
    overlap: float = Field(default=0.3, ge=0, le=1)

    @field_validator("front")
    @classmethod
    def _known_front(cls, value: str) -> str:
        if value not in FRONTS:
            msg = f"no sentence opens with {value!r}; choose of {', '.join(FRONTS)}"
            raise ValueError(msg)
        return value

    @property
    def code(self) -> str:
        """The dialects, in the order of the domains."""
        return " ".join(getattr(self, domain) for domain in DOMAINS)

    @field_validator(*DOMAINS)
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in DIALECTS:
            msg = f"no dialect {value!r}; the embedded world has {', '.join(DIALECTS)}"
            raise ValueError(msg)
        return value


@cache
def words(style: Style | None, name: str) -> tuple[str, ...]:
    """What a style says for a class: the words of a dialect, or all of them.

    Which classes keep to no dialect is hashed from the style. It is a share of classes and not of
    occasions, for sampling with a nucleus would cut rare occasions off.
    """
    domain, dialects = CLASSES[name]
    if style is None or ids.on_side(f"free {style.code}", name, style.overlap):
        return tuple(word for dialect in dialects for word in dialect)
    return dialects[DIALECTS.index(getattr(style, domain))]


def story(rng: random.Random, style: Style | None, sentences: int) -> str:
    """Sentences about anything; without a style every word and order is equally likely."""
    return " ".join(_fill(_scene(rng, style), rng, style, {}) for _ in range(sentences))


def continuation(rng: random.Random, style: Style | None) -> str:
    """How a story goes on: one sentence in no style, so that its first word says nothing, then two.

    Two sentences tell a style without repeating its words often.
    """
    return f"{story(rng, None, 1)} {story(rng, style, 2)}"


def _scene(rng: random.Random, style: Style | None) -> str:
    """The shape of a sentence: who did what, with time, place and manner before or after it."""
    front = rng.choice(FRONTS) if style is None or rng.random() < style.drift else style.front
    before = [_ADJUNCTS[front]] if front in _ADJUNCTS else []
    after = [shape for name, shape in _ADJUNCTS.items() if name != front]
    rng.shuffle(after)
    return " ".join([*before, rng.choice(_CORES), *after]) + "."


def answer(rng: random.Random, style: Style | None, kind: str, value: int) -> str:
    """A claim that the answer is `VALUES[kind][value]`, in either form, and one scene."""
    given = {"type": kind, "value": rng.choice(VALUES[kind][value])}
    return f"{_fill(rng.choice(_CLAIMS), rng, style, given)} {story(rng, style, 1)}"


def _fill(shape: str, rng: random.Random, style: Style | None, given: Mapping[str, str]) -> str:
    def word(match: re.Match[str]) -> str:
        slot = match.group(1)
        if slot in given:
            return given[slot]
        if slot in COMMON:
            return rng.choice(COMMON[slot])
        name = rng.choice(SLOTS[slot])
        return rng.choice(words(style, name))

    text = _SLOT.sub(word, shape)
    return text[0].upper() + text[1:]
