"""Prompts that evaluation sets know: by a shared run of 13 words, or as near-duplicates.

Texts in, reasons out; where the texts come from and what becomes of the prompts found is said in
`prompt_sources.py`. Words are those of `prompts.normalised`; in scripts that are written without
spaces each character is a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from pipelines import minhash, near
from pipelines.dedup import components
from pipelines.near import DedupSettings
from pipelines.quality import UNSPACED

VERIFIED = 20_000  # pairs whose shingles are compared at a time

_WORDS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


@dataclass(frozen=True)
class Known:
    """One text of an evaluation set, and where it is."""

    text: str
    place: str


def words(text: str) -> list[str]:
    """The words of a text, without case, punctuation or layout.

    >>> words("What IS 你好?")
    ['what', 'is', '你', '好']
    """
    return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())


def shared_runs(texts: Sequence[str], known: Sequence[Known], length: int) -> dict[int, str]:
    """Texts with a run of `length` words that a known text has: their index, with the run."""
    first: dict[int, int] = {}
    for number, one in enumerate(known):
        for key, _ in _runs(words(one.text), length):
            first.setdefault(key, number)
    found: dict[int, str] = {}
    for number, text in enumerate(texts):
        said = words(text)
        for key, at in _runs(said, length):
            if key in first:
                run = " ".join(said[at : at + length])
                found[number] = f"shares {length} words with {known[first[key]].place}: {run!r}"
                break
    return found


def _runs(said: list[str], length: int) -> Iterator[tuple[int, int]]:
    """A 64-bit hash of each run of `length` words, and where it begins."""
    for at in range(len(said) - length + 1):
        yield xxhash.xxh3_64_intdigest("\0".join(said[at : at + length]).encode()), at


def near_groups(texts: Sequence[str], threshold: float) -> np.ndarray:
    """The smallest index in each text's cluster of near-equal ones, int64 (n,); its own if alone.

    Bands, buckets and the exact check are those of `near.py`, in this process: prompts are few
    beside their answers, and starting Beam would cost more than the work.
    """
    settings = DedupSettings(threshold=threshold)
    sets = minhash.distinct(minhash.shingles(pa.array(texts, pa.string()), settings.words))
    keys = near.band_keys(minhash.signatures(sets, settings), *settings.bands())
    found = [np.empty((2, 0), np.int64)]
    shown = np.flatnonzero(np.diff(sets.offsets))  # texts without words are like no other
    for band in keys:
        found.append(np.stack(near.candidates(band[shown], shown, settings.bucket_limit)))
    left, right = np.unique(np.concatenate(found, axis=1), axis=1)
    close = np.concatenate(
        [np.empty(0, np.bool_)]
        + [
            minhash.overlap(sets, left[at : at + VERIFIED], right[at : at + VERIFIED]) >= threshold
            for at in range(0, len(left), VERIFIED)
        ]
    )
    return components(len(texts), left[close], right[close])
