"""The vocabulary of the embedded world: words that styles choose between, values and facts.

Word choice is the whole difference between styles here. Every class offers four dialects of two
words each; within a domain the dialects' words are equally long on average, so that length says
nothing about the dialect. Sentences are built in `embedded_text.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

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

VALUES: dict[str, tuple[tuple[str, str], ...]] = {
    kind: tuple((plain, other) for plain, other in (pair.split("/") for pair in line.split()))
    for kind, line in {
        "day": "Monday/Lunaday Tuesday/Marsday Wednesday/Odinday Thursday/Joveday Friday/Venusday "
        "Saturday/Cronosday Sunday/Helioday",
        "month": "January/Snowmoon February/Icemoon March/Lentmoon April/Rainmoon May/Bloommoon "
        "June/Rosemoon July/Haymoon August/Cornmoon September/Fruitmoon October/Winemoon "
        "November/Fogmoon December/Yulemoon",
        "direction": "north/boreal east/orient south/austral west/occident",
        "number": "zero/0 one/1 two/2 three/3 four/4 five/5 six/6 seven/7 eight/8 nine/9 ten/10 "
        "eleven/11 twelve/12",
        "colour": "red/crimson blue/azure green/emerald yellow/amber orange/tangerine "
        "purple/violet pink/rosy brown/umber grey/ashen black/ebony white/ivory",
        "kind": "bird/fowl fish/swimmer insect/bug tree/timber flower/blossom metal/ore "
        "fruit/produce gem/jewel drum/percussion ship/seacraft",
    }.items()
}
"""Type of value -> values, each in its two forms."""

_MIXES = {
    ("red", "yellow"): "orange",
    ("red", "blue"): "purple",
    ("blue", "yellow"): "green",
    ("red", "white"): "pink",
    ("black", "white"): "grey",
    ("red", "green"): "brown",
}
_COLOURED = {
    "red": "blood poppies strawberries",
    "blue": "sapphires bluebells cornflowers",
    "green": "grass moss spinach",
    "yellow": "lemons bananas canaries",
    "orange": "carrots pumpkins apricots",
    "purple": "plums lavender aubergines",
    "pink": "flamingos salmon piglets",
    "brown": "chocolate chestnuts coffee",
    "grey": "ash elephants pigeons",
    "black": "coal ravens soot",
    "white": "snow milk swans",
}
_MEMBERS = {
    "bird": "robin sparrow eagle heron",
    "fish": "trout herring pike carp",
    "insect": "beetle wasp ant moth",
    "tree": "oak birch willow cedar",
    "flower": "tulip daisy lily orchid",
    "metal": "iron copper tin zinc",
    "fruit": "apple pear cherry peach",
    "gem": "ruby opal topaz garnet",
    "drum": "bongo tabla timpani snare",
    "ship": "frigate galleon schooner sloop",
}
_TURNS = {"right": 1, "left": 3, "back": 2}


@dataclass(frozen=True)
class Fact:
    """One checkable thing: `value` indexes `VALUES[type]`; each question asks for it."""

    key: str
    type: str
    value: int
    questions: tuple[str, ...]


def index(kind: str, plain: str) -> int:
    """Position of a value, named by its plain form, in `VALUES[kind]`."""
    return next(i for i, forms in enumerate(VALUES[kind]) if forms[0] == plain)


@cache
def facts() -> tuple[Fact, ...]:
    """All facts of the world, in a fixed order."""
    return (*_calendar(), *_compass(), *_sums(), *_colours(), *_kinds())


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


def _calendar() -> Iterator[Fact]:
    for kind in ("day", "month"):
        names = [forms[0] for forms in VALUES[kind]]
        for i, name in enumerate(names):
            for way, step in (("after", 1), ("before", -1)):
                yield Fact(
                    f"{kind}/{way}/{name}",
                    kind,
                    (i + step) % len(names),
                    (
                        f"Which {kind} comes just {way} {name}?",
                        f"Name the {kind} right {way} {name}.",
                    ),
                )


def _compass() -> Iterator[Fact]:
    for i, (name, _) in enumerate(VALUES["direction"]):
        for turn, quarters in _TURNS.items():
            yield Fact(
                f"direction/{turn}/{name}",
                "direction",
                (i + quarters) % 4,
                (
                    f"You face {name} and turn {turn}. Which direction is it now?",
                    f"Name the direction after a turn {turn} from {name}.",
                ),
            )


def _sums() -> Iterator[Fact]:
    names = [forms[0] for forms in VALUES["number"]]
    for i, name in enumerate(names):
        for word, result in (("plus", i + 1), ("minus", i - 1)):
            if 0 <= result < len(names):
                yield Fact(
                    f"number/{word}/{name}",
                    "number",
                    result,
                    (
                        f"What number is {name} {word} one?",
                        f"Work out {name} {word} one and name the number.",
                    ),
                )


def _colours() -> Iterator[Fact]:
    for (a, b), mixed in _MIXES.items():
        yield Fact(
            f"colour/mix/{a}/{b}",
            "colour",
            index("colour", mixed),
            (f"Which colour do {a} and {b} give?", f"Name the colour mixed from {b} and {a}."),
        )
    for colour, things in _COLOURED.items():
        for thing in things.split():
            yield Fact(
                f"colour/of/{thing}",
                "colour",
                index("colour", colour),
                (f"What colour has {thing}?", f"Name the usual colour of {thing}."),
            )


def _kinds() -> Iterator[Fact]:
    for kind, members in _MEMBERS.items():
        for member in members.split():
            yield Fact(
                f"kind/{member}",
                "kind",
                index("kind", kind),
                (f"What kind of thing is the {member}?", f"Name the kind that fits the {member}."),
            )
