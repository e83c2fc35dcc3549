"""Identities: 128-bit content hashes, seeds and hash splits derived from them.

An id says what a thing is made of, so making it again gives the same id. Ids are 16 raw bytes in
Python, `pa.uuid()` in Arrow, UUID in the lake.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash


def content_id(kind: str, *fields: str | bytes | int | float | bool | None) -> bytes:
    """BLAKE2b-128 of a kind and its fields, each with type and length so that none run together."""
    digest = hashlib.blake2b(digest_size=16)
    for field in (kind, *fields):
        if field is None:
            digest.update(b"n;")
            continue
        tag = b"b" if isinstance(field, bytes) else b"t"
        data = field if isinstance(field, bytes) else str(field).encode()
        digest.update(b"%s%d:" % (tag, len(data)))
        digest.update(data)
    return digest.digest()


def of_file(path: Path) -> bytes:
    """XXH3-128 of a file's content, 16 bytes; name, place and times do not matter."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def seed_of(trajectory_id: bytes) -> int:
    """The sampling seed of a trajectory: the low 63 bits of its id."""
    return int.from_bytes(trajectory_id[8:], "big") >> 1


def on_side(kind: str, key: str, share: float, seed: int = 0) -> bool:
    """Whether `key` falls in a hash split of `share` (0..1); the same for ever for one seed."""
    digest = content_id("split", kind, key, seed)
    return int.from_bytes(digest[:8], "big") < share * 2**64


def text(value: bytes | UUID) -> str:
    """The usual written form, 8-4-4-4-12 hex digits."""
    return str(value if isinstance(value, UUID) else UUID(bytes=value))


def raw(value: bytes | UUID) -> bytes:
    """The 16 bytes of an id, whether Arrow gave it as UUID or it is raw already."""
    return value.bytes if isinstance(value, UUID) else value


def from_text(written: str) -> bytes:
    """The raw id behind its written form."""
    return UUID(written).bytes


def array(values: Iterable[bytes | None]) -> pa.ExtensionArray:
    """Raw ids as an Arrow array of type `pa.uuid()`."""
    return pa.ExtensionArray.from_storage(pa.uuid(), pa.array(list(values), pa.binary(16)))


def storage(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The fixed-size-binary values behind an id column, in one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # no chunks at all
            column = pa.concat_arrays(column.chunks) if column.num_chunks else array([])
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def codes(column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Factorise an id column: int64 codes (n,) and the distinct raw ids they index."""
    encoded = pc.dictionary_encode(storage(column))
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary


def words(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Ids as big-endian uint64 pairs (n, 2): numpy can sort and compare them in id order."""
    raw = storage(column)
    if raw.null_count:
        msg = "an id column holds nulls"
        raise ValueError(msg)
    start = raw.offset * 16
    buffer = raw.buffers()[1]
    data = np.frombuffer(buffer, np.uint8) if buffer is not None else np.empty(0, np.uint8)
    return data[start : start + 16 * len(raw)].view(">u8").reshape(-1, 2).astype(np.uint64)


def order(words: np.ndarray) -> np.ndarray:
    """Rows of `words` (n, 2) in ascending order, equal ones by row number, int64 (n,).

    High words alone are sorted first: of hashes hardly two are equal, and one sort is fast.
    """
    high, low = words[:, 0], words[:, 1]
    rows = np.argsort(high)
    equal = high[rows[1:]] == high[rows[:-1]]
    tied = np.flatnonzero((np.append(equal, False) | np.append(False, equal))[: len(rows)])
    some = rows[tied]
    rows[tied] = some[np.lexsort((some, low[some], high[some]))]
    return rows


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), on uint64.

    A bijection in which every bit depends on every other.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
