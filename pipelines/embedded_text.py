"""Sentences of the embedded world: how a style words stories and answers.

A style prefers one dialect in each domain of words and, with the share `overlap`, takes any other
word of the class; nothing else tells styles apart. The shapes of sentences are common to all.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from pydantic import Field, field_validator

from pipelines.embedded_words import CLASSES, COMMON, DIALECTS, DOMAINS, SLOTS, VALUES
from pipelines.settings import Settings

_SCENES = (
    "The {look} {who} {handles} the {thing} {how}.",
    "At {dawn} the {look} {who} {does} {how}.",
    "The {who} {handles} the {look} {thing} {near} the {where}.",
    "{opens} the {who} {handles} the {look} {thing} {how}.",
    "{opens} the {look} {who} {does} {near} the {where}.",
    "The {who} {does} {how} {near} the {look} {where}.",
    "The {who} {does} {how} {while} the {thing} was {look}.",
)
_CLAIMS = (
    "{holds} the {look} {who} {tells} the {type} is {value}.",
    "The {look} {who} {how} {tells} it is {value}.",
    "{holds} it is {value} and the {who} {tells} so {how}.",
    "By the {look} {thing} the {type} is {value}.",
    "The {type} is {value} {while} the {look} {who} {tells} so.",
)
_SLOT = re.compile(r"\{(\w+)\}")


class Style(Settings):
    """A way of wording: the dialect preferred in each domain; `overlap` is the share of others."""

    deeds: str
    looks: str
    manners: str
    overlap: float = Field(default=0.15, ge=0, le=1)

    @field_validator(*DOMAINS)
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in DIALECTS:
            msg = f"no dialect {value!r}; the embedded world has {', '.join(DIALECTS)}"
            raise ValueError(msg)
        return value


def story(rng: random.Random, style: Style | None, sentences: int) -> str:
    """Sentences about anything; without a style every word of a class is equally likely."""
    return " ".join(_fill(rng.choice(_SCENES), rng, style, {}) for _ in range(sentences))


def answer(rng: random.Random, style: Style | None, kind: str, value: int) -> str:
    """A claim that the answer is `VALUES[kind][value]`, in either form, among two scenes."""
    form = rng.choice(VALUES[kind][value])
    claim = _fill(rng.choice(_CLAIMS), rng, style, {"type": kind, "value": form})
    first, second = story(rng, style, 1), story(rng, style, 1)
    return rng.choice((f"{claim} {first} {second}", f"{first} {claim} {second}"))


def _fill(shape: str, rng: random.Random, style: Style | None, given: Mapping[str, str]) -> str:
    def word(match: re.Match[str]) -> str:
        slot = match.group(1)
        if slot in given:
            return given[slot]
        if slot in COMMON:
            return rng.choice(COMMON[slot])
        domain, dialects = CLASSES[rng.choice(SLOTS[slot])]
        if style is None or rng.random() < style.overlap:
            return rng.choice(rng.choice(dialects))
        return rng.choice(dialects[DIALECTS.index(getattr(style, domain))])

    text = _SLOT.sub(word, shape)
    return text[0].upper() + text[1:]
