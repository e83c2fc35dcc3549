"""MinHash signatures over Arrow batches, bit-equal to datasketch's affine32 scheme.

Texts become sets of shingles, sets become signatures, and the share of equal places in two
signatures estimates the Jaccard similarity of the two sets (Broder 1997), with a standard error
of sqrt(J (1 - J) / permutations). Which texts are then compared is decided in `dedup.py`.

The recipe. A text is split at white space; each word is lower-cased, code point by code point, and
loses the characters that show nothing (controls, zero-width space, joiners and the like); a word
left empty is none. In scripts that are written without spaces each character is a word. A shingle
is `words` consecutive words; a text with fewer has one shingle, all its words, so that short texts
match only when they are the same words. A text without words has no shingle: it is `empty`, and its
signature is datasketch's of an empty set, all ones. In bytes:

    hashes  = [xxh32(word.encode()) for word in words]
    shingle = b"".join(h.to_bytes(4, "little") for h in hashes[i : i + 5])
    minhash = datasketch.MinHash(128, seed=1, scheme="affine32", hashfunc=xxh32)
    minhash.update(shingle)

Texts are read as bytes, by the compiled loops of `compiled.py` or, without numba, by numpy: no
Python runs per word, only once per distinct word of a batch and per permutation. Both give the
same bits.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import Field

from pipelines.quality import INVISIBLE, UNSPACED
from pipelines.settings import Settings

SCHEME = "affine32"
METADATA = b"polar.minhash"
SHINGLE = "lower-cased words; characters where words have no spaces"
CHUNK = 65_536  # shingles permuted at a time: 256 kB stay in a core's cache
_INVISIBLE = f"{INVISIBLE}+"


class MinHashSettings(Settings):
    """What makes two signatures comparable; it is written into the file that holds them."""

    permutations: int = Field(default=128, ge=16, le=1024)
    seed: int = Field(default=1, ge=0, lt=2**32)
    words: int = Field(default=5, ge=1, le=16, description="words in a shingle")

    def metadata(self) -> dict[bytes, bytes]:
        """Key-value metadata for the schema of a signatures file."""
        own = {name: getattr(self, name) for name in MinHashSettings.model_fields}
        recipe = {"scheme": SCHEME, "hash": "xxh32", "shingle": SHINGLE, **own}
        return {METADATA: json.dumps(recipe, sort_keys=True).encode()}

    @staticmethod
    def of(schema: pa.Schema) -> MinHashSettings:
        """The settings that a signatures file was made with.

        Raises:
            ValueError: the schema holds no recipe, or that of another scheme.
        """
        recipe = json.loads((schema.metadata or {}).get(METADATA, b"{}"))
        if recipe.get("scheme") != SCHEME:
            msg = f"not a signatures file of scheme {SCHEME}: its metadata says {recipe}"
            raise ValueError(msg)
        return MinHashSettings(**{name: recipe[name] for name in MinHashSettings.model_fields})


class Shingles(NamedTuple):
    """The shingle hashes of n texts, text after text, repeats included."""

    hashes: np.ndarray  # uint32 (shingles,)
    offsets: np.ndarray  # int64 (n + 1,); text i has hashes[offsets[i] : offsets[i + 1]]

    def take(self, texts: np.ndarray) -> Shingles:
        """Those of some texts, by index."""
        starts, sizes = self.offsets[texts], np.diff(self.offsets)[texts]
        offsets = _offsets(sizes)
        places = np.repeat(starts - offsets[:-1], sizes) + np.arange(offsets[-1])
        return Shingles(self.hashes[places], offsets)


def signatures_schema(settings: MinHashSettings) -> pa.Schema:
    """Schema of a signatures file: trajectory_id and its signature, recipe in the metadata."""
    signature = pa.list_(pa.field("item", pa.uint32(), nullable=False), settings.permutations)
    return pa.schema(
        [
            pa.field("trajectory_id", pa.uuid(), nullable=False),
            pa.field("signature", signature, nullable=False),
        ],
        settings.metadata(),
    )


def shingles(texts: pa.Array, words: int = 5) -> Shingles:
    """The shingle hashes of each text, by the recipe above.

    Args:
        texts: strings (n,), without nulls.
        words: words in a shingle.
    """
    if (fast := compiled()) is not None:
        starts, data = _bytes(texts)
        room = (len(data) + 1) // 2 + len(texts)
        hashes = np.empty(room, np.uint32)
        offsets = np.empty(len(texts) + 1, np.int64)
        points = 0x80 if data.max(initial=0) < 0x80 else 0x110000
        fast.shingle_pass(data, starts, fold(points), words, hashes, offsets)
        return Shingles(hashes[: offsets[-1]].copy(), offsets)
    tokens, offsets = _words(texts)
    starts, lengths = offsets[:-1], np.diff(offsets)
    sizes = np.where(lengths >= words, lengths - words + 1, np.minimum(lengths, 1))
    found = Shingles(np.empty(sizes.sum(), np.uint32), _offsets(sizes))
    for length in range(1, words):  # short texts: one shingle
        short = np.flatnonzero(lengths == length)
        lanes = [tokens[starts[short] + i] for i in range(length)]
        found.hashes[found.offsets[:-1][short]] = _xxh32(lanes)
    windows = len(tokens) - words + 1
    if windows > 0:
        every = np.concatenate(
            [
                _xxh32([tokens[at + i : min(at + CHUNK, windows) + i] for i in range(words)])
                for at in range(0, windows, CHUNK)
            ]
        )
        long = lengths >= words
        counts = np.where(long, sizes, 0)
        within = np.arange(counts.sum()) - np.repeat(_offsets(counts)[:-1], counts)
        target = np.repeat(found.offsets[:-1], counts) + within
        found.hashes[target] = every[np.repeat(starts, counts) + within]
    return found


def signatures(sets: Shingles, settings: MinHashSettings | None = None) -> np.ndarray:
    """MinHash signatures, uint32 (n, permutations); all ones for a text without shingles."""
    settings = settings or MinHashSettings()
    factors, terms = permutations(settings)
    if (fast := compiled()) is not None:
        result = np.full((len(sets.offsets) - 1, settings.permutations), 2**32 - 1, np.uint32)
        fast.minima_pass(sets.hashes, sets.offsets, factors, terms, result)
        return result
    hashes, offsets = _fmix32(sets.hashes), sets.offsets
    texts = np.flatnonzero(np.diff(offsets))
    starts, ends = offsets[:-1][texts], offsets[1:][texts]
    result = np.full((len(offsets) - 1, settings.permutations), 2**32 - 1, np.uint32)
    at = 0
    while at < len(texts):
        end = max(at + 1, int(np.searchsorted(ends, starts[at] + CHUNK, side="right")))
        part, cuts = hashes[starts[at] : ends[end - 1]], starts[at:end] - starts[at]
        minima = np.empty((settings.permutations, end - at), np.uint32)
        permuted = np.empty_like(part)
        for row, factor, term in zip(minima, factors, terms, strict=True):
            np.multiply(part, factor, out=permuted)
            np.add(permuted, term, out=permuted)
            np.minimum.reduceat(permuted, cuts, out=row)
        result[texts[at:end]] = minima.T
        at = end
    return result


@cache
def compiled() -> ModuleType | None:
    """The compiled loops; none without numba, or with POLAR_COMPILED=0 in the environment."""
    if os.environ.get("POLAR_COMPILED", "1") == "0":
        return None
    try:
        from pipelines import compiled as loops
    except ImportError:
        return None
    return loops


@cache
def permutations(settings: MinHashSettings) -> np.ndarray:
    """The permutation parameters of datasketch, a and b, uint32 (2, permutations)."""
    from datasketch import MinHash

    return MinHash(settings.permutations, seed=settings.seed, scheme=SCHEME).permutations


def distinct(sets: Shingles) -> Shingles:
    """The same sets without repeats, each hash where it first stands in its text."""
    if (fast := compiled()) is not None:
        hashes, offsets = np.empty_like(sets.hashes), np.empty_like(sets.offsets)
        made = fast.distinct_pass(sets.hashes, sets.offsets, hashes, offsets)
        return Shingles(hashes[:made].copy(), offsets)
    sizes = np.diff(sets.offsets)
    text = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
    _, first = np.unique(text << np.uint64(32) | sets.hashes, return_index=True)
    kept = np.sort(first)
    return Shingles(sets.hashes[kept], np.searchsorted(kept, sets.offsets).astype(np.int64))


def matrix(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A signature column as numpy, uint32 (n, permutations)."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)


def jaccard(sets: Shingles, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Exact Jaccard similarity of pairs of texts, float64 (pairs,); 0 for two empty ones.

    Shingles are compared by their 32-bit hashes: for two answers of 200 words the odds that two
    different shingles pass for one are 1 in 100,000.

    Args:
        sets: shingles of the texts.
        left: index of each pair's one text, (pairs,).
        right: index of its other text, (pairs,).
    """
    return overlap(distinct(sets), left, right)


def overlap(sets: Shingles, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`jaccard` of sets that are known to hold no hash twice."""
    sizes = np.diff(sets.offsets)
    if (fast := compiled()) is not None:
        common = np.empty(len(left), np.int64)
        fast.common_pass(sets.hashes, sets.offsets, left, right, common)
    else:
        from scipy.sparse import csr_array

        members = csr_array(
            (np.ones(len(sets.hashes), np.int32), sets.hashes.astype(np.int64), sets.offsets),
            shape=(len(sizes), 2**32),
        )
        members.sort_indices()
        common = members[left].multiply(members[right]).sum(axis=1)
    return common / np.maximum(sizes[left] + sizes[right] - common, 1)


@cache
def fold(points: int = 0x110000) -> np.ndarray:
    """What each code point is to a word, int32.

    Its lower case, 0 (shows nothing), -1 (space), or its negative where it is a word on its own.

    Arrow is asked, once in a process, so that it is what the numpy form does as well; but not
    about ideographs and private use, which are what they are (a test asks about all).
    """
    asked = np.arange(points, dtype=np.uint32)
    asked = asked[
        ((asked < 0xD800) | (asked > 0xDFFF)) & ((asked < 0x20000) | (asked >> 12 == 0xE0))
    ]
    texts = pa.array(list(map(chr, asked.tolist())), pa.string())
    spaces = pc.equal(pc.list_value_length(pc.utf8_split_whitespace(texts)), 2)
    lower = pc.utf8_lower(texts)
    shown = pc.replace_substring_regex(lower, pattern=_INVISIBLE, replacement="")
    visible = np.flatnonzero(pc.not_equal(shown, "").to_numpy(zero_copy_only=False))
    table = np.arange(points, dtype=np.int32)
    table[asked] = 0
    table[asked[visible]] = list(map(ord, shown.take(pa.array(visible)).to_pylist()))
    for low, high in re.findall("(.)-(.)", UNSPACED):
        alone = table[ord(low) : ord(high) + 1]
        np.negative(alone, out=alone)
    table[asked[spaces.to_numpy(zero_copy_only=False)]] = -1
    return table


def _bytes(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Where each text begins in the buffer, (n + 1,), and the buffer, uint8."""
    wide = pa.types.is_large_string(texts.type)
    _, offsets, data = texts.buffers()
    kind = np.int64 if wide else np.int32
    if not len(texts) or offsets is None or data is None:
        return np.zeros(len(texts) + 1, np.int64), np.zeros(0, np.uint8)
    starts = np.frombuffer(offsets, kind)[texts.offset : texts.offset + len(texts) + 1]
    low, high = int(starts[0]), int(starts[-1])
    return starts.astype(np.int64) - low, np.frombuffer(data, np.uint8)[low:high]


def _words(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Word hashes of all texts, uint32, and the offsets of each text's words, int64 (n + 1,)."""
    split = pc.utf8_split_whitespace(
        pc.replace_substring_regex(texts, pattern=f"([{UNSPACED}])", replacement=r" \1 ")
    )
    offsets = split.offsets.to_numpy().astype(np.int64)
    encoded = split.values.slice(offsets[0], offsets[-1] - offsets[0]).dictionary_encode()
    vocabulary = pc.replace_substring_regex(
        pc.utf8_lower(encoded.dictionary), pattern=_INVISIBLE, replacement=""
    )
    distinct = vocabulary.cast(pa.binary()).to_pylist()
    hashes = np.fromiter((xxhash.xxh32_intdigest(word) for word in distinct), np.uint32)
    visible = np.fromiter((bool(word) for word in distinct), np.bool_)
    places = encoded.indices.to_numpy(zero_copy_only=False)
    kept = visible[places]
    return hashes[places[kept]], _offsets(kept)[offsets - offsets[0]]


def _offsets(sizes: np.ndarray) -> np.ndarray:
    """Running sums that begin with 0, int64 (n + 1,)."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _xxh32(lanes: list[np.ndarray]) -> np.ndarray:
    """xxHash32, seed 0, of byte strings of one length, given as little-endian 32-bit lanes.

    Source: the xxHash specification, github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
    """
    p1, p2, p3, p4, p5 = (
        np.uint32(p) for p in (2654435761, 2246822519, 3266489917, 668265263, 374761393)
    )
    stripes = len(lanes) // 4 * 4
    state = np.full(len(lanes[0]), p5, np.uint32)
    if stripes:
        first = (int(p1) + int(p2), int(p2), 0, -int(p1))
        sums = [np.full(len(state), value % 2**32, np.uint32) for value in first]
        for i, lane in enumerate(lanes[:stripes]):
            sums[i % 4] = _rotate(sums[i % 4] + lane * p2, 13) * p1
        state = _rotate(sums[0], 1) + _rotate(sums[1], 7)
        state = state + _rotate(sums[2], 12) + _rotate(sums[3], 18)
    state = state + np.uint32(4 * len(lanes))
    for lane in lanes[stripes:]:
        state = _rotate(state + lane * p3, 17) * p4
    state = (state ^ (state >> np.uint32(15))) * p2
    state = (state ^ (state >> np.uint32(13))) * p3
    return state ^ (state >> np.uint32(16))


def _rotate(values: np.ndarray, bits: int) -> np.ndarray:
    return (values << np.uint32(bits)) | (values >> np.uint32(32 - bits))


def _fmix32(values: np.ndarray) -> np.ndarray:
    """MurmurHash3's finalizer, which affine32 applies to each hash before it is permuted."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))
