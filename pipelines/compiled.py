"""The compiled inner loops of dedup and pairs: words, shingles, minima, what two share, by numba.

Each has a numpy form beside its caller in `minhash.py` that gives the same bits, for machines
where numba is not installed or is switched off with POLAR_COMPILED=0. What the recipe is and why
stands there; here is only how it is run over bytes without a Python object per text.

The first call in a new environment compiles for some seconds. The machine code is then kept under
POLAR_HOME, or in a folder of the user's own in the temporary directory, never in the source tree.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numba
import numpy as np
from numba import njit, uint32, uint64


def _cache_folder() -> Path:
    """Where machine code is kept: only in a folder that nobody else can write to."""
    if home := os.environ.get("POLAR_HOME"):
        folder = Path(home) / "cache" / "numba"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = Path(tempfile.gettempdir()) / f"polar-numba-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="polar-numba-"))
    return folder


numba.config.CACHE_DIR = str(_cache_folder())  # type: ignore[attr-defined]

P1, P2, P3, P4, P5 = (
    np.uint32(p) for p in (2654435761, 2246822519, 3266489917, 668265263, 374761393)
)
SPACE = -1  # in a fold table: this code point ends a word; 0 says that it shows nothing, and
# what is less that the code point of that size is a word on its own


@njit(inline="always")
def _rotate(value, bits):
    value = uint32(value)
    return uint32((value << uint32(bits)) | (value >> uint32(32 - bits)))


@njit(inline="always")
def _round(state, lane):
    return uint32(_rotate(uint32(state + uint32(lane * P2)), 13) * P1)


@njit(inline="always")
def _avalanche(state):
    state = uint32((state ^ (state >> uint32(15))) * P2)
    state = uint32((state ^ (state >> uint32(13))) * P3)
    return uint32(state ^ (state >> uint32(16)))


@njit(inline="always")
def _xxh32(lanes, size):
    """xxHash32, seed 0, of `size` bytes that stand in little-endian lanes, zeros after them."""
    whole = size >> 2
    at = 0
    if whole >= 4:
        one, two = uint32(P1 + P2), P2
        three, four = uint32(0), uint32(uint32(0) - P1)
        while at + 4 <= whole:
            one = _round(one, lanes[at])
            two = _round(two, lanes[at + 1])
            three = _round(three, lanes[at + 2])
            four = _round(four, lanes[at + 3])
            at += 4
        state = uint32(_rotate(one, 1) + _rotate(two, 7))
        state = uint32(state + uint32(_rotate(three, 12) + _rotate(four, 18)))
    else:
        state = P5
    state = uint32(state + uint32(size))
    while at < whole:
        state = uint32(_rotate(uint32(state + uint32(lanes[at] * P3)), 17) * P4)
        at += 1
    tail = lanes[whole]
    for _ in range(size & 3):
        state = uint32(_rotate(uint32(state + uint32((tail & uint32(255)) * P5)), 11) * P1)
        tail = uint32(tail >> uint32(8))
    return _avalanche(state)


@njit(inline="always")
def _utf8(point):
    """The bytes of a code point, the first one lowest, and how many there are."""
    if point < 0x80:
        return point, 1
    if point < 0x800:
        return 0xC0 | (point >> 6) | ((0x80 | (point & 0x3F)) << 8), 2
    if point < 0x10000:
        encoded = 0xE0 | (point >> 12) | ((0x80 | ((point >> 6) & 0x3F)) << 8)
        return encoded | (0x80 | (point & 0x3F)) << 16, 3
    encoded = 0xF0 | (point >> 18) | ((0x80 | ((point >> 12) & 0x3F)) << 8)
    encoded |= (0x80 | ((point >> 6) & 0x3F)) << 16
    return encoded | (0x80 | (point & 0x3F)) << 24, 4


@njit(cache=True)
def shingle_pass(data, starts, fold, words, hashes, offsets):
    """Shingle hashes of texts that lie in one buffer; see `minhash.shingles`.

    Args:
        data: UTF-8 bytes of all texts, uint8.
        starts: text i is data[starts[i] : starts[i + 1]], (n + 1,).
        fold: by code point: its lower case, 0 if it shows nothing, SPACE, or less; int32.
        words: words in a shingle.
        hashes: written to, uint32; half the bytes and one for each text are always enough.
        offsets: written to, int64 (n + 1,), as in `minhash.Shingles`.
    """
    longest = 0
    for text in range(len(starts) - 1):
        longest = max(longest, starts[text + 1] - starts[text])
    lanes = np.zeros(longest // 2 + 4, np.uint32)  # a lower case can take twice the bytes
    tokens = np.empty(longest // 2 + 2, np.uint32)
    made = 0
    offsets[0] = 0
    for text in range(len(starts) - 1):
        at, end = starts[text], starts[text + 1]
        count = 0
        size = 0
        lane = uint32(0)
        while at <= end:
            if at == end:
                shown = SPACE
                at += 1
            else:
                byte = data[at]
                if byte < 0x80:
                    shown = fold[byte]
                    at += 1
                else:
                    if byte < 0xE0:
                        point, more = byte & 0x1F, 2
                    elif byte < 0xF0:
                        point, more = byte & 0x0F, 3
                    else:
                        point, more = byte & 0x07, 4
                    for i in range(1, more):
                        point = (point << 6) | (data[at + i] & 0x3F)
                    shown = fold[point]
                    at += more
            if shown > 0:
                encoded, more = _utf8(shown)
                for _ in range(more):
                    lane = uint32(lane | (uint32(encoded & 255) << uint32(8 * (size & 3))))
                    encoded >>= 8
                    size += 1
                    if size & 3 == 0:
                        lanes[(size >> 2) - 1] = lane
                        lane = uint32(0)
            elif shown < 0:
                if size:
                    lanes[size >> 2] = lane
                    tokens[count] = _xxh32(lanes, size)
                    count += 1
                    size = 0
                    lane = uint32(0)
                if shown < SPACE:
                    encoded, more = _utf8(-shown)
                    lanes[0] = uint32(encoded)
                    lanes[1] = uint32(0)
                    tokens[count] = _xxh32(lanes, more)
                    count += 1
        if count >= words and words == 5:
            for i in range(count - 4):  # the loop below for the usual size, which vectorises
                one = _rotate(_round(uint32(P1 + P2), tokens[i]), 1)
                two = _rotate(_round(P2, tokens[i + 1]), 7)
                three = _rotate(_round(uint32(0), tokens[i + 2]), 12)
                four = _rotate(_round(uint32(uint32(0) - P1), tokens[i + 3]), 18)
                state = uint32(uint32(one + two) + uint32(three + four))
                state = uint32(state + uint32(20))
                state = uint32(_rotate(uint32(state + uint32(tokens[i + 4] * P3)), 17) * P4)
                hashes[made + i] = _avalanche(state)
            made += count - 4
        elif count:
            window = min(words, count)
            for i in range(count - window + 1):
                for k in range(window):
                    lanes[k] = tokens[i + k]
                lanes[window] = uint32(0)
                hashes[made] = _xxh32(lanes, 4 * window)
                made += 1
        offsets[text + 1] = made


@njit(cache=True)
def minima_pass(hashes, offsets, factors, terms, result):
    """Minima over permuted hashes, uint32 (n, permutations); `result` comes filled with ones."""
    permutations = len(factors)
    for text in range(len(offsets) - 1):
        row = result[text]
        for at in range(offsets[text], offsets[text + 1]):
            value = hashes[at]  # MurmurHash3's finalizer, as in `minhash._fmix32`
            value = uint32((value ^ (value >> uint32(16))) * uint32(0x85EBCA6B))
            value = uint32((value ^ (value >> uint32(13))) * uint32(0xC2B2AE35))
            value = uint32(value ^ (value >> uint32(16)))
            for k in range(permutations):
                row[k] = min(row[k], uint32(uint32(value * factors[k]) + terms[k]))


@njit(inline="always")
def _slot(value, mask):
    return (uint64(value) * uint64(0x9E3779B97F4A7C15) >> uint64(32)) & mask


@njit(inline="always")
def _size(hashes):
    """Slots of a hash table that is at most half full; as few as that allows: they stay near."""
    size = 4
    while size < 2 * hashes:
        size *= 2
    return size


@njit(inline="always")
def _tables(offsets):
    """Slots that are enough for any text: their hashes, and whose they are (at first nobody's)."""
    longest = 1
    for text in range(len(offsets) - 1):
        longest = max(longest, offsets[text + 1] - offsets[text])
    size = _size(longest)
    return np.empty(size, np.uint32), np.full(size, -1, np.int64)


@njit(cache=True)
def distinct_pass(hashes, offsets, kept, ends):
    """Each hash of a text once, in order of appearance; returns how many were kept."""
    values, owners = _tables(offsets)
    made = 0
    ends[0] = 0
    for text in range(len(offsets) - 1):
        mask = uint64(_size(offsets[text + 1] - offsets[text]) - 1)
        for at in range(offsets[text], offsets[text + 1]):
            value = hashes[at]
            slot = _slot(value, mask)
            while owners[slot] == text and values[slot] != value:
                slot = (slot + uint64(1)) & mask
            if owners[slot] != text:
                owners[slot] = text
                values[slot] = value
                kept[made] = value
                made += 1
        ends[text + 1] = made
    return made


@njit(cache=True)
def common_pass(hashes, offsets, left, right, common):
    """How many hashes two texts share, for pairs of texts whose hashes are distinct.

    Pairs in order of `left` are fastest: its table is made once for all that follow each other.
    """
    values, owners = _tables(offsets)
    mask = uint64(0)
    for pair in range(len(left)):
        text = left[pair]
        if pair == 0 or text != left[pair - 1]:
            mask = uint64(_size(offsets[text + 1] - offsets[text]) - 1)
            for at in range(offsets[text], offsets[text + 1]):
                slot = _slot(hashes[at], mask)
                while owners[slot] == pair:
                    slot = (slot + uint64(1)) & mask
                owners[slot] = pair
                values[slot] = hashes[at]
            owner = pair
        shared = 0
        for at in range(offsets[right[pair]], offsets[right[pair] + 1]):
            value = hashes[at]
            slot = _slot(value, mask)
            while owners[slot] == owner and values[slot] != value:
                slot = (slot + uint64(1)) & mask
            shared += owners[slot] == owner
        common[pair] = shared


@njit(cache=True)
def agreement(signatures, left, right, result):
    """The share of equal permutations of signatures (n, permutations), for pairs; float32."""
    permutations = signatures.shape[1]
    for pair in range(len(left)):
        one, other = signatures[left[pair]], signatures[right[pair]]
        equal = 0
        for k in range(permutations):
            equal += one[k] == other[k]
        result[pair] = equal / permutations
