"""The vocabulary of the embedded world: words that styles choose between, values and facts.

Word choice is the whole difference between styles here. Every class offers four dialects of two
words each; within a domain the dialects' words are equally long on average, so that length says
nothing about the dialect. Sentences are built in `embedded_text.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

from pipelines.ids import content_id

DIALECTS = ("coast", "forest", "hill", "town")
_LEXICON = {
    "deeds": {
        "walked": "walked wandered, strode hurried, roamed trudged, ambled marched",
        "waited": "paused stayed, dozed loitered, rested lounged, waited lingered",
        "spoke": "sang whispered, spoke muttered, talked murmured, hummed chatted",
        "smiled": "nodded chuckled, smiled shrugged, laughed blinked, grinned giggled",
        "saw": "saw observed, noticed watched, spotted studied, viewed glimpsed",
        "carried": "hauled brought, lugged carried, lifted pulled, pushed dragged",
        "made": "made designed, drew painted, built crafted, shaped formed",
        "kept": "hid protected, held guarded, saved stored, kept hoarded",
        "liked": "loved favoured, adored praised, liked cherished, admired enjoyed",
        "fixed": "washed repaired, mended restored, patched cleaned, fixed polished",
    },
    "looks": {
        "old": "old weathered, aged antique, worn ancient, faded shabby",
        "big": "vast giant, huge mighty, large grand, big massive",
        "small": "tiny compact, short narrow, small slender, little slight",
        "quiet": "calm tranquil, quiet peaceful, silent hushed, still placid",
        "shiny": "shiny sparkling, bright glowing, vivid radiant, sunny gleaming",
        "dark": "dark sombre, dusky shady, dim shadowy, murky gloomy",
        "happy": "merry content, jolly joyful, glad cheerful, happy pleased",
        "tired": "weary sleepy, lazy exhausted, idle drained, tired drowsy",
        "tidy": "neat orderly, trim clean, tidy spotless, pure fresh",
        "strong": "firm robust, solid strong, stout hardy, tough sturdy",
        "odd": "weird bizarre, odd peculiar, quaint unusual, strange curious",
        "good": "fine splendid, good pleasant, lovely superb, decent worthy",
    },
    "manners": {
        "slowly": "slowly patiently, gently gradually, softly steadily, calmly lazily",
        "quickly": "rapidly hastily, fast promptly, swiftly briskly, quickly speedily",
        "gladly": "gladly cheerfully, kindly eagerly, warmly willingly, happily proudly",
        "secretly": "quietly together, alone discreetly, openly privately, secretly silently",
        "carefully": "nicely skilfully, properly carefully, neatly cautiously, closely precisely",
        "loudly": "boldly noisily, fiercely wildly, loudly bravely, firmly sternly",
    },
}
DOMAINS = tuple(_LEXICON)
CLASSES: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    name: (domain, tuple(tuple(words.split()) for words in line.split(",")))
    for domain, classes in _LEXICON.items()
    for name, line in classes.items()
}
"""Class name -> (domain, words of each dialect in the order of `DIALECTS`)."""

# What a sentence's slot may be filled with: classes, of which a style chooses the word ...
SLOTS: dict[str, tuple[str, ...]] = {
    "does": ("walked", "waited", "spoke", "smiled"),
    "handles": ("saw", "carried", "made", "kept", "liked", "fixed"),
    "look": tuple(_LEXICON["looks"]),
    "how": tuple(_LEXICON["manners"]),
}
# ... or words that are common to all styles.
COMMON: dict[str, tuple[str, ...]] = {
    slot: tuple(words.split())
    for slot, words in {
        "who": "farmer sailor miller weaver baker tailor mason potter boy girl cousin nephew "
        "mayor priest judge bishop",
        "where": "meadow garden market orchard square village valley harbour cottage castle "
        "chapel tower street alley",
        "thing": "chest basket barrel bucket needle hammer ladder shovel cheese butter honey "
        "bread scarf shirt jacket cloak lantern candle mirror kettle letter ledger map book",
        "near": "near behind beside beyond under",
        "dawn": "dawn dusk noon midnight",
        "while": "while since because though",
        "opens": "soon later often usually",
        "holds": "surely clearly perhaps probably",
        "tells": "said thought believed claimed",
    }.items()
}

# Every town has one thing that can be asked about: what it is, the two ways to ask, its values.
_THINGS = {
    "kind": (
        "Which kind of sign has the inn of {}?",
        "Name the kind on the inn sign of {}.",
        "bird/fowl fish/swimmer tree/timber flower/blossom",
    ),
    "colour": (
        "Which colour has the flag of {}?",
        "Name the colour of the flag of {}.",
        "red/crimson green/emerald blue/azure yellow/amber",
    ),
    "season": (
        "In which season is the fair of {}?",
        "Name the season of the fair of {}.",
        "spring/vernal summer/estival autumn/fall winter/hibernal",
    ),
    "side": (
        "On which side of the country is {}?",
        "Name the side where {} lies.",
        "north/boreal east/orient south/austral west/occident",
    ),
    "count": (
        "Which count of gates has {}?",
        "Name the count of gates of {}.",
        "two/2 four/4 six/6 eight/8",
    ),
    "stuff": (
        "Which stuff is the hall of {} made of?",
        "Name the stuff of the hall of {}.",
        "wood/lumber stone/rock wool/fleece metal/iron",
    ),
    "taste": (
        "Which taste has the soup of {}?",
        "Name the taste of the soup of {}.",
        "sweet/sugary sour/acidic salty/briny bitter/acrid",
    ),
}
_TOWNS = (
    "Ash Ban Bram Cal Cor Dal Dun Elm Fal Gar Hart Hex Ken Lang Lyd Mar Nor Orm Pen Quen Rad Rip "
    "Skel Tam Thorn Up Wex Yar",
    "bury combe dale field ford ham ton wick",
)
VALUES: dict[str, tuple[tuple[str, str], ...]] = {
    kind: tuple((plain, other) for plain, other in (forms.split("/") for forms in values.split()))
    for kind, (*_, values) in _THINGS.items()
}
"""Type of value -> values, each in its two forms."""


@dataclass(frozen=True)
class Fact:
    """One checkable thing: `value` indexes `VALUES[type]`; each question asks for it."""

    key: str
    type: str
    value: int
    questions: tuple[str, ...]


@cache
def facts() -> tuple[Fact, ...]:
    """All facts of the world, in a fixed order: each value of a type is that of as many towns.

    They are many, so that a reward model does not learn each by heart but compares what answers
    say, and made up, so that no model knows them beforehand.
    """
    towns = sorted(map("".join, product(*map(str.split, _TOWNS))), key=partial(content_id, "town"))
    kinds = list(VALUES)
    found = []
    for number, town in enumerate(towns):
        kind = kinds[number % len(kinds)]
        value = number // len(kinds) % len(VALUES[kind])
        questions = tuple(shape.format(town) for shape in _THINGS[kind][:2])
        found.append(Fact(f"{kind}/{town}", kind, value, questions))
    return tuple(found)


@cache
def by_question() -> dict[str, Fact]:
    """The fact that each question asks for."""
    return {question: fact for fact in facts() for question in fact.questions}


def stated(kind: str, text: str) -> list[tuple[int, int]]:
    """The values of a type that a text names, as (value, form) indexes, in their order."""
    forms = _forms(kind)
    return [forms[word] for word in re.findall(r"\w+", text) if word in forms]


@cache
def _forms(kind: str) -> dict[str, tuple[int, int]]:
    return {
        form: (value, number)
        for value, forms in enumerate(VALUES[kind])
        for number, form in enumerate(forms)
    }
