"""Near-equal texts by MinHash-LSH: band keys, buckets, candidate pairs, exact verification.

Band keys, never signatures or texts, travel through Beam. Texts that share a bucket are candidates;
a candidate pair whose shingle sets have an exact Jaccard similarity of at least `threshold` is
near. What becomes of near pairs, clusters and counts, is in `dedup.py`.

What is found. A pair of similarity s shares one of b bands of r rows with the probability
1 - (1 - s^r)^b. datasketch chooses b and r for the threshold, and a miss weighs more than a false
alarm (`miss_weight`), for a false alarm only costs its verification: at the defaults (16 bands of
8) 0.947 at s = 0.8 and 0.9998 at s = 0.9, each pair by itself; a cluster has several chances.

In a bucket of more than `bucket_limit` texts each is compared with the smallest and with the next
`bucket_limit` - 1 in id order, so that the work is linear in the bucket. A pair further apart is
found when another band brings it together, or joined through others; it is missed otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipelines import minhash
from pipelines.minhash import MinHashSettings, Shingles

SHARD_KEYS = 1_000_000  # band keys that one worker sorts at a time
VERIFY_PAIRS = 20_000  # pairs whose shingles are in memory at a time
PAIR = pa.schema([("left", pa.int64()), ("right", pa.int64())])


class DedupSettings(MinHashSettings):
    """What counts as near, and how hard it is looked for."""

    threshold: float = Field(default=0.8, gt=0.0, le=0.95, description="exact Jaccard of a pair")
    miss_weight: float = Field(
        default=0.95, ge=0.5, lt=1.0, description="weight of a miss in the choice of bands"
    )
    bucket_limit: int = Field(
        default=64, ge=2, description="texts up to which a bucket is compared all with all"
    )

    def bands(self) -> tuple[int, int]:
        """Bands and rows in a band, as datasketch chooses them for the threshold."""
        from datasketch import MinHashLSH

        weights = (1 - self.miss_weight, self.miss_weight)
        lsh = MinHashLSH(self.threshold, self.permutations, weights=weights)
        return lsh.b, lsh.r


@dataclass(frozen=True, kw_only=True)
class Entries:
    """What goes into buckets; each text at most once per realm.

    Attributes:
        row: row of the signature, int64 (n,), ascending.
        text: number of the text, int64 (n,), under 2**32; the order within buckets.
        realm: int64 (n,); only texts of one realm share buckets.
    """

    row: np.ndarray
    text: np.ndarray
    realm: np.ndarray


@dataclass(frozen=True)
class ShingleFile:
    """The shingles of many texts in a folder: appended in order, read at random."""

    folder: Path

    def append(self, sets: Shingles) -> None:
        """Add the next texts."""
        with (self.folder / "shingles.u32").open("ab") as file:
            sets.hashes.tofile(file)
        with (self.folder / "sizes.i64").open("ab") as file:
            np.diff(sets.offsets).tofile(file)

    def open(self) -> Shingles:
        """All texts; the hashes stay on disk until they are asked for."""
        sizes = np.fromfile(self.folder / "sizes.i64", np.int64)
        hashes = np.fromfile(self.folder / "shingles.u32", np.uint32, count=0)
        if sizes.any():
            hashes = np.memmap(self.folder / "shingles.u32", np.uint32, mode="r")
        return Shingles(hashes, np.concatenate([[0], np.cumsum(sizes)]))


def near_pairs(
    signatures: Path, entries: Entries, settings: DedupSettings, scratch: Path
) -> np.ndarray:
    """Verified near pairs of texts, left < right, int64 (pairs, 2), sorted.

    Args:
        signatures: Parquet file of `minhash.signatures_schema`.
        entries: which rows of it go into which buckets.
        settings: threshold, bands and bucket limit.
        scratch: folder with the `ShingleFile` of the same rows; workers must see it too.

    Raises:
        CountMismatchError: rows were lost on the way.
    """
    from pipelines.beam import add, beam, check_counts, run_pipeline, write_parquet

    bands, rows = settings.bands()
    shards = 1 + len(entries.row) // SHARD_KEYS
    limit, threshold = settings.bucket_limit, settings.threshold
    np.save(scratch / "entries.npy", np.stack([entries.row, entries.text, entries.realm]))

    def keyed(group: tuple[int, int, int]) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        number, start, stop = group
        table = pq.ParquetFile(signatures).read_row_group(number, ["signature"])
        saved = np.load(scratch / "entries.npy", mmap_mode="r")
        row, text, realm = saved[:, slice(*np.searchsorted(saved[0], [start, stop]))]
        salt = _mix(realm.astype(np.uint64))
        for band, hashed in enumerate(band_keys(minhash.matrix(table["signature"]), bands, rows)):
            key = _mix(hashed[row - start] ^ salt)
            shard = key % np.uint64(shards)
            for s in range(shards):
                yield (band, s), pa.table({"key": key[shard == s], "text": text[shard == s]})

    def paired(tables: Iterable[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
        bucket_shard = pa.concat_tables(tables)
        add("keys", bucket_shard.num_rows)
        key, text = (column.to_numpy() for column in bucket_shard)
        left, right = _distinct(*candidates(key, text, limit))
        add("candidates sent", len(left))
        for s in range(shards):
            mine = left % shards == s
            yield s, pa.table([left[mine], right[mine]], schema=PAIR)

    def verified(tables: Iterable[pa.Table]) -> pa.Table:
        pairs = pa.concat_tables(tables)
        add("candidates", pairs.num_rows)
        left, right = _distinct(*(column.to_numpy() for column in pairs))
        near = verify(left, right, scratch, threshold)
        return pa.table([left[near], right[near]], schema=PAIR)

    counts = run_pipeline(
        lambda pipeline: (
            pipeline
            | "Row groups" >> beam.Create(_row_groups(signatures))
            | "Band keys" >> beam.FlatMap(keyed).with_output_types(tuple[tuple[int, int], pa.Table])
            | "By band and shard" >> beam.GroupByKey()
            | "Bucket tables" >> beam.Values()
            | "Candidates" >> beam.FlatMap(paired).with_output_types(tuple[int, pa.Table])
            | "By pair shard" >> beam.GroupByKey()
            | "Pair tables" >> beam.Values()
            | "Verify" >> beam.Map(verified).with_output_types(pa.Table)
            | write_parquet(scratch / "near", PAIR)
        )
    )
    counts["keys sent"] = bands * len(entries.row)
    check_counts("near pairs", counts, "keys sent", ["keys"])
    check_counts("near pairs", counts, "candidates sent", ["candidates"])
    found = pq.read_table(scratch / "near", schema=PAIR)
    return np.stack(_distinct(*(column.to_numpy() for column in found)), axis=1)


def band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """64-bit hashes of the bands of signatures, uint64 (bands, n).

    Multilinear hashing with fixed odd factors. Two bands that meet by chance share a bucket and
    are told apart by verification.
    """
    factors = np.random.default_rng(0).integers(0, 2**64, rows, np.uint64) | np.uint64(1)
    parts = signatures[:, : bands * rows].reshape(-1, bands, rows)
    keys = np.zeros(parts.shape[:2], np.uint64)
    for row in range(rows):
        keys += (parts[:, :, row] + np.uint64(1)) * factors[row]
    return np.ascontiguousarray(keys.T)


def candidates(keys: np.ndarray, texts: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of texts that share a key, left < right.

    Args:
        keys: bucket of each entry, uint64 (n,).
        texts: its text, int64 (n,), distinct within a bucket.
        limit: in a larger bucket, each is compared with the smallest and the next `limit` - 1.
    """
    order = np.lexsort((texts, keys))
    keys, texts = keys[order], texts[order]
    first = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))
    sizes = np.diff(first, append=len(keys))
    starts, ends = np.repeat(first, sizes), np.repeat(first + sizes, sizes)
    place = np.arange(len(keys))
    far = place[place - starts >= limit]
    lefts, rights = [starts[far]], [far]
    for step in range(1, limit):
        place = place[place + step < ends[place]]
        if not len(place):
            break
        lefts.append(place)
        rights.append(place + step)
    return texts[np.concatenate(lefts)], texts[np.concatenate(rights)]


def verify(left: np.ndarray, right: np.ndarray, scratch: Path, threshold: float) -> np.ndarray:
    """Whether the exact Jaccard similarity of each pair of texts reaches the threshold."""
    row, text, _ = np.load(scratch / "entries.npy", mmap_mode="r")
    row_of = np.zeros(text.max(initial=0) + 1, np.int64)
    row_of[text] = row
    sets = ShingleFile(scratch).open()
    near = np.zeros(len(left), np.bool_)
    for at in range(0, len(left), VERIFY_PAIRS):
        part = slice(at, at + VERIFY_PAIRS)
        texts, place = np.unique(np.stack([left[part], right[part]]), return_inverse=True)
        here = sets.take(row_of[texts])
        near[part] = minhash.jaccard(here, *place.reshape(2, -1)) >= threshold
    return near


def _row_groups(file: Path) -> list[tuple[int, int, int]]:
    """Number, first row and end of each row group."""
    metadata = pq.read_metadata(file)
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    return [(i, end - size, end) for i, (size, end) in enumerate(zip(sizes, ends, strict=True))]


def _distinct(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pair once, sorted."""
    packed = np.unique((left.astype(np.uint64) << np.uint64(32)) | right.astype(np.uint64))
    low = packed & np.uint64(2**32 - 1)
    return (packed >> np.uint64(32)).astype(np.int64), low.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit depends on every other."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
