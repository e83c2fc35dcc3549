"""Loops, emptiness, broken characters and cut endings: measured and marked, never dropped.

Plain functions over texts. Which trajectory hit its token limit is known to the engine alone, so
the flag `truncated` is set where trajectories are made or ingested; language is not judged here.

The loop rule. A text loops when it ends in a section that follows on itself: at least
`LOOP_REPEATS` times (a last, broken-off repeat not counted) and over at least `LOOP_LENGTH`
characters, white space after it aside. Repetition that the text leaves again (a chorus, a table)
is no loop. The period is read off the last place where the text's ending occurred before, so one
test costs two substring searches.
"""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LOOP_REPEATS = 3
LOOP_LENGTH = 48
LOOP_KEPT = 2  # repeats left by `cut_loop`, so that the habit stays visible

# What shows nothing: separators, controls, format characters (zero-width space and joiners, word
# joiner, byte-order mark), and the letters and marks that Unicode defines as blank.
_BLANK = (
    r"\A[\s\p{Z}\p{Cc}\p{Cf}"
    r"\x{034F}\x{115F}\x{1160}\x{17B4}\x{17B5}\x{2800}\x{3164}\x{FE00}-\x{FE0F}\x{FFA0}]*\z"
)
_CONTROL = r"[\x00-\x08\x0B\x0C\x0E-\x1F\x7F-\x{9F}]"  # all but tab, line feed, carriage return
_REPLACEMENT = "\ufffd"

# Up to the last mark that closes a sentence: a full stop after a digit may be a list's number, and
# in scripts without spaces the mark alone is enough.
_SENTENCES = re.compile(
    r""".*(?:(?:(?<!\d)\.|[!?\u2026])["'\u2019\u201d\u00bb)\]*_]*(?=\s|\Z)"""
    r"""|[\u3002\uff01\uff1f\u0964]["\u201d\u2019\uff09\u300d\u300f]*)""",
    re.DOTALL,
)


def flags(texts: pa.Array | pa.ChunkedArray) -> pa.ListArray:
    """The quality flags of each text, in the order of `schemas.FLAGS`; all but `truncated`.

    Args:
        texts: strings, (n,); a null has no flags.

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
        "control_characters": _mask(pc.match_substring_regex(texts, _CONTROL)),
        "replacement_character": _mask(pc.match_substring(texts, _REPLACEMENT)),
    }
    marked = np.stack(list(found.values()), axis=1)
    offsets = np.concatenate([[0], np.cumsum(marked.sum(axis=1))])
    names = pa.array(list(found)).take(pa.array(np.nonzero(marked)[1]))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names)


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
