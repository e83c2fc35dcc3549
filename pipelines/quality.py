"""Loops, emptiness, broken characters, cut endings, refusals, other languages: measured, marked.

Plain functions over texts; nothing is dropped. Which answer hit its token limit is known to the
engine alone, so that has to be said.

Language is told by script alone, read off Unicode: an answer in Cyrillic to a prompt in Latin is
seen, a French answer to an English prompt is not. No library that tells languages apart is light
and offline enough to be sure about answers of a few words.

A refusal is told by how an answer begins: a list of openings in ten languages. It is a mark for
people who look for such answers, not a judgement.

The loop rule. A text loops when it ends in a section that follows on itself: at least
`LOOP_REPEATS` times (a last, broken-off repeat not counted) and over at least `LOOP_LENGTH`
characters, white space after it aside. Repetition that the text leaves again (a chorus, a table)
is no loop. The period is read off the last place where the text's ending occurred before, so one
test costs two substring searches.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LOOP_REPEATS = 3
LOOP_LENGTH = 48
LOOP_KEPT = 2  # repeats left by `cut_loop`, so that the habit stays visible

# What shows nothing: separators, controls, format characters (zero-width space and joiners, word
# joiner, byte-order mark), and the letters and marks that Unicode defines as blank.
INVISIBLE = (
    r"[\s\p{Z}\p{Cc}\p{Cf}"
    r"\x{034F}\x{115F}\x{1160}\x{17B4}\x{17B5}\x{2800}\x{3164}\x{FE00}-\x{FE0F}\x{FFA0}]"
)
# Thai, Lao, Tibetan, Myanmar, Khmer, Kana, Han: no spaces between words.
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U000323af"
)
_BLANK = rf"\A{INVISIBLE}*\z"
_CONTROL = r"[\x00-\x08\x0B\x0C\x0E-\x1F\x7F-\x{9F}]"  # all but tab, line feed, carriage return
_REPLACEMENT = "\ufffd"

# Scripts by their letters. Han is shared by Chinese and Japanese, so Kana decides between them.
SCRIPTS = {
    "latin": r"\p{Latin}",
    "cyrillic": r"\p{Cyrillic}",
    "greek": r"\p{Greek}",
    "arabic": r"\p{Arabic}",
    "hebrew": r"\p{Hebrew}",
    "devanagari": r"\p{Devanagari}",
    "bengali": r"\p{Bengali}",
    "tamil": r"\p{Tamil}",
    "thai": r"\p{Thai}",
    "hangul": r"\p{Hangul}",
    "kana": r"[\p{Hiragana}\p{Katakana}]",
    "han": r"\p{Han}",
}
SCRIPT_LOOK = 500  # characters of a text that are looked at
SCRIPT_LETTERS = 10  # a text with fewer letters of its main script is of no script
SCRIPT_SHARE = 0.6  # of its letters that the main script must have
KANA_SHARE = 0.1  # of Han and Kana together, from which they are Japanese

# What refusals begin with, lower-cased, after quotation marks and white space.
_REFUSALS = (
    r"(?:i'?m |i am )?(?:so |very |really |truly )?sorry,? (?:but )?(?:i|as an)\b[^.!?\n]{0,20}"
    r"(?:can'?t|cannot|can not|am unable|'?m unable|am not able|'?m not able|won'?t|will not)",
    r"i (?:can'?t|cannot|can not|won'?t|will not|must decline|have to decline)\s?(?:to )?"
    r"(?:assist|help|comply|provide|answer|fulfil|fulfill|do that|engage|support|create|write)",
    r"i'?m (?:unable|not able) to",
    r"i am (?:unable|not able) to",
    r"as an? (?:ai|artificial intelligence|large language model|language model)[^.!?\n]{0,60}"
    r"(?:can'?t|cannot|unable|not able|don'?t|do not)",
    r"(?:je suis |)désolée?,? (?:mais )?je ne (?:peux|puis)",
    r"je ne (?:peux|puis) pas (?:vous )?(?:aider|répondre|fournir)",
    r"(?:es )?tut mir (?:sehr )?leid,? (?:aber )?(?:ich|das|dabei|da)\b[^.!?\n]{0,40}"
    r"(?:kann|nicht)",
    r"ich kann (?:ihnen|dir|das|dabei|diese|keine)[^.!?\n]{0,40}(?:nicht|keine)",
    r"lo siento,? (?:pero )?no puedo",
    r"no puedo (?:ayudar|proporcionar|responder|cumplir)",
    r"(?:desculpe|lamento|sinto muito),? (?:mas )?(?:eu )?não posso",
    r"mi dispiace,? (?:ma )?non posso",
    r"(?:извините|простите|к сожалению|мне жаль),? (?:но )?я не (?:могу|смогу)",
    r"(?:很|非常|十分)?(?:抱歉|对不起)[,，。！]?\s?(?:但是?|作为.{0,14})?[,，]?\s?我?(?:无法|不能|没有办法|没办法)",
    r"作为(?:一个|一名)?(?:ai|人工智能|大?语言模型)[^。！？\n]{0,20}(?:无法|不能)",
    r"申し訳(?:ございません|ありません)[^。\n]{0,40}(?:できません|できかねます|お答え)",
    r"(?:죄송합니다|죄송하지만|미안하지만)[^.!?\n]{0,40}(?:수 없|어렵)",
)
_REFUSAL = r"\A[\s\"'\x{201C}\x{2018}\x{00AB}*_]*(?:" + "|".join(_REFUSALS) + ")"
_OPENING = 160  # characters looked at

# Up to the last mark that closes a sentence: a full stop after a digit may be a list's number, and
# in scripts without spaces the mark alone is enough.
_SENTENCES = re.compile(
    r""".*(?:(?:(?<!\d)\.|[!?\u2026])["'\u2019\u201d\u00bb)\]*_]*(?=\s|\Z)"""
    r"""|[\u3002\uff01\uff1f\uff61\u0964\u061f\u06d4\u0589\u1362\u104b\u17d4]["\u201d\u2019\uff09\u300d\u300f]*)""",
    re.DOTALL,
)


def flags(
    texts: pa.Array | pa.ChunkedArray,
    prompts: pa.Array | pa.ChunkedArray | None = None,
    truncated: np.ndarray | None = None,
) -> pa.ListArray:
    """The quality flags of each text, in the order of `schemas.FLAGS`.

    Args:
        texts: strings, (n,); a null has no flags.
        prompts: what they answer, (n,); without it `other_language` is not told.
        truncated: which of them hit their token limit, bool (n,); default: none.

    Returns:
        list<string>, (n,), without nulls.
    """
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    found = {
        "empty": _mask(pc.match_substring_regex(texts, _BLANK)),
        "loop": np.fromiter(
            (text is not None and _period(text) is not None for text in texts.to_pylist()),
            np.bool_,
            len(texts),
        ),
        "truncated": np.zeros(len(texts), np.bool_) if truncated is None else truncated,
        "control_characters": _mask(pc.match_substring_regex(texts, _CONTROL)),
        "replacement_character": _mask(pc.match_substring(texts, _REPLACEMENT)),
        "refusal": _mask(pc.match_substring_regex(_opening(texts), _REFUSAL)),
    }
    if prompts is not None:
        asked, said = scripts(prompts), scripts(texts)
        found["other_language"] = (asked != said) & (asked != "") & (said != "")
    marked = np.stack(list(found.values()), axis=1)
    offsets = np.concatenate([[0], np.cumsum(marked.sum(axis=1))])
    names = pa.array(list(found)).take(pa.array(np.nonzero(marked)[1]))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names)


def scripts(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The script that most letters of each text are of, (n,), by the names of `SCRIPTS`.

    Empty for a text with too few letters, or without a script that most of them are of.

    >>> scripts(pa.array(["Where is the station?", "Где находится вокзал?", "42"])).tolist()
    ['latin', 'cyrillic', '']
    """
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    if not len(texts):
        return np.empty(0, "U16")
    plain = pc.utf8_slice_codeunits(pc.fill_null(texts, ""), 0, SCRIPT_LOOK)
    names = [*SCRIPTS]
    letters = np.stack(
        [
            pc.count_substring_regex(plain, pattern).to_numpy(zero_copy_only=False)
            for pattern in SCRIPTS.values()
        ]
    )
    kana, han = names.index("kana"), names.index("han")
    japanese = letters[kana] > KANA_SHARE * (letters[kana] + letters[han])
    letters[kana] += np.where(japanese, letters[han], 0)
    letters[han] = np.where(japanese, 0, letters[han])
    main = letters.argmax(axis=0)
    most = letters.max(axis=0)
    sure = (most >= SCRIPT_LETTERS) & (most >= SCRIPT_SHARE * letters.sum(axis=0))
    return np.where(sure, np.array(names)[main], "")


def _opening(texts: pa.Array) -> pa.Array:
    """The beginning of each text, lower-cased, with plain apostrophes."""
    start = pc.utf8_lower(pc.utf8_slice_codeunits(texts, 0, _OPENING))
    return pc.replace_substring(start, "\u2019", "'")


def finish(text: str, flags: Collection[str]) -> tuple[str, str | None]:
    """The text as kept, by its flags, and what was cut: a loop, else an ending broken off."""
    if "loop" in flags:
        return cut_loop(text)[0], "loop"
    if "truncated" in flags:
        text, shortened = cut_sentence(text)
        return text, "sentence" if shortened else None
    return text, None


def cut_loop(text: str) -> tuple[str, bool]:
    """Cut a loop at the end of `text`, keeping its first repeats; and whether there was one.

    >>> cut_loop("So it goes: " + "La la la, he sang. " * 9)
    ('So it goes: La la la, he sang. La la la, he sang.', True)
    """
    found = _period(text)
    if found is None:
        return text, False
    period, end = found
    start = end - period
    while start and text[start - 1] == text[start - 1 + period]:
        start -= 1
    return text[: start + LOOP_KEPT * period], True


def cut_sentence(text: str) -> tuple[str, bool]:
    """End a broken-off `text` at its last complete sentence; and whether that shortened it.

    Without a complete sentence the last complete line is the end; without one of those either,
    the text stays as it is.
    """
    sentences = _SENTENCES.match(text)
    kept = sentences.group() if sentences else text[: max(text.rstrip().rfind("\n"), 0)].rstrip()
    return (kept, len(kept) < len(text)) if kept.strip() else (text, False)


def _period(text: str) -> tuple[int, int] | None:
    """Length of the section that `text` ends up repeating, and where the last repeat ends."""
    for end in dict.fromkeys((len(text), len(text.rstrip()))):
        for probe in (16, 64):  # the longer one for sections that hold a smaller repetition
            before = text.rfind(text[end - probe : end], 0, end - 1) if end > probe else -1
            if before < 0:
                break
            period = end - probe - before
            run = max(LOOP_REPEATS * period, LOOP_LENGTH)
            if run <= end and text[end - run : end - period] == text[end - run + period : end]:
                return period, end
    return None


def _mask(column: pa.Array) -> np.ndarray:
    return pc.fill_null(column, False).to_numpy(zero_copy_only=False)
