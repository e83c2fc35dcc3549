"""The vocabulary of the embedded world: words that styles choose between, values and facts.

Word choice is the whole difference between styles here. Every class offers four dialects of two
words each; within a domain the dialects' words are equally long on average, so that length says
nothing about the dialect. Sentences are built in `embedded_text.py`.
"""

from __future__ import annotations

import re
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

_FACTS = {
    "kind": {
        "bird/fowl": "robin sparrow eagle heron falcon pigeon",
        "fish/swimmer": "trout herring pike carp salmon cod",
        "tree/timber": "oak birch willow cedar beech poplar",
        "flower/blossom": "tulip daisy lily orchid violet crocus",
    },
    "colour": {
        "red/crimson": "blood poppies strawberries tomatoes rubies cherries",
        "green/emerald": "grass moss spinach lettuce ferns peas",
        "blue/azure": "sapphires bluebells cornflowers denim sky cobalt",
        "yellow/amber": "lemons bananas canaries sunflowers maize buttercups",
    },
    "season": {
        "spring/vernal": "March April May lambs seedlings nests",
        "summer/estival": "June July August sunburn swimming haymaking",
        "autumn/fall": "September October November chestnuts harvests acorns",
        "winter/hibernal": "December January February snowmen skating icicles",
    },
    "side": {
        "north/boreal": "Marlow Tenby Skelton Brampton Corwen Hexley",
        "east/orient": "Dunmore Ashby Wexcombe Felton Ripley Orford",
        "south/austral": "Lydford Penrose Bexhill Camber Stowell Iverton",
        "west/occident": "Harwood Kelso Norbury Quenby Truro Upwell",
    },
    "count": {
        "two/2": "hen goose duck swan ostrich penguin",
        "four/4": "horse cow dog cat sheep goat",
        "six/6": "ant bee wasp beetle moth fly",
        "eight/8": "spider scorpion tick mite octopus tarantula",
    },
    "stuff": {
        "wood/lumber": "door table oar fence broom raft",
        "stone/rock": "wall bridge pillar statue millstone tomb",
        "wool/fleece": "sock mitten jumper blanket beret carpet",
        "metal/iron": "nail sword coin horseshoe padlock chain",
    },
    "taste": {
        "sweet/sugary": "syrup jam toffee nectar fudge treacle",
        "sour/acidic": "vinegar limes rhubarb pickles sorrel gooseberries",
        "salty/briny": "anchovies olives seawater capers bacon crisps",
        "bitter/acrid": "coffee cocoa hops wormwood tonic quinine",
    },
}
_QUESTIONS = {
    "kind": ("Which kind of thing is the {}?", "Name the kind that fits the {}."),
    "colour": ("Which colour goes with {}?", "Name the usual colour of {}."),
    "season": ("Which season goes with {}?", "Name the season of {}."),
    "side": ("On which side of the country is {}?", "Name the side where {} lies."),
    "count": ("Which count of legs has the {}?", "Name the count of legs of the {}."),
    "stuff": ("Which stuff is the {} made of?", "Name the stuff of the {}."),
    "taste": ("Which taste goes with {}?", "Name the usual taste of {}."),
}
VALUES: dict[str, tuple[tuple[str, str], ...]] = {
    kind: tuple((plain, other) for plain, other in (forms.split("/") for forms in values))
    for kind, values in _FACTS.items()
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
    """All facts of the world, in a fixed order."""
    return tuple(
        Fact(f"{kind}/{name}", kind, value, tuple(shape.format(name) for shape in _QUESTIONS[kind]))
        for kind, values in _FACTS.items()
        for value, names in enumerate(values.values())
        for name in names.split()
    )


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
