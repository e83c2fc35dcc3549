"""Near-equal texts by MinHash-LSH: band keys, buckets, candidate pairs, exact verification.

Band keys, never signatures or texts, travel through Beam. Texts that share a bucket are candidates;
a candidate pair whose shingle sets have an exact Jaccard similarity of at least `threshold` is
near. What becomes of near pairs, clusters and counts, is in `dedup.py`; how new texts are looked
for among known ones is in `dedup_index.py`.

What is found. A pair of similarity s shares one of b bands of r rows with the probability
1 - (1 - s^r)^b. datasketch chooses b and r for the threshold, and a miss weighs more than a false
alarm (`miss_weight`), for a false alarm only costs its verification: at the defaults (16 bands of
8) 0.947 at s = 0.8 and 0.9998 at s = 0.9, each pair by itself; a cluster has several chances.

In a bucket of more than `bucket_limit` texts each is compared with the smallest and with the next
`bucket_limit` - 1 in order of their hashes, so that the work is linear in the bucket. A pair
further apart is found when another band brings it together, or joined through others; it is missed
otherwise.

Two stages with files between them, each one Beam pipeline a process: bands to candidates, where a
process has a range of bands, and candidates to near pairs, where it has a range of texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines import ids, minhash
from pipelines.minhash import MinHashSettings
from pipelines.sketches import read_shingles, read_signatures

if TYPE_CHECKING:
    from pipelines.beam import beam

SHARD_KEYS = 1_000_000  # band keys that one worker sorts at a time
VERIFY_PAIRS = 50_000  # pairs whose shingles are in memory at a time
LOW = np.uint64(2**32 - 1)


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
        row: row of the signature over all parts, int64 (n,), ascending.
        text: number of the text, int64 (n,), under 2**32; the order within buckets.
        realm: uint64 (n,); only texts of one realm share buckets.
    """

    row: np.ndarray
    text: np.ndarray
    realm: np.ndarray

    def save(self, folder: Path) -> None:
        """Write where the workers of a stage look for it."""
        stacked = np.stack([self.row, self.text, self.realm.astype(np.uint64).view(np.int64)])
        np.save(folder / "entries.npy", stacked)

    @staticmethod
    def load(folder: Path) -> Entries:
        """What `save` wrote, read when it is used."""
        row, text, realm = np.load(folder / "entries.npy", mmap_mode="r")
        return Entries(row=row, text=text, realm=realm.view(np.uint64))


def near_pairs(
    parts: Sequence[Path],
    entries: Entries,
    settings: DedupSettings,
    scratch: Path,
    *,
    runs: Path | None = None,
    workers: int = 1,
    options: Sequence[str] = (),
) -> np.ndarray:
    """Verified near pairs of texts, left < right, int64 (pairs, 2), sorted.

    Args:
        parts: folders made by `sketches.sketch`.
        entries: which rows of them go into which buckets.
        settings: threshold, bands and bucket limit.
        scratch: an empty folder for what the stages hand on; workers must see it too.
        runs: folder to leave the sorted band keys in, for `dedup_index.py`.
        workers: processes side by side.
        options: Beam's, for another runner.

    Raises:
        CountMismatchError: rows were lost on the way.
    """
    from pipelines.beam import check_counts, run_shares

    bands, _ = settings.bands()
    shards = 1 + len(entries.row) // SHARD_KEYS
    entries.save(scratch)
    texts = int(entries.text.max(initial=-1)) + 1
    for shard in range(shards):
        (scratch / "candidates" / str(shard)).mkdir(parents=True)
    (scratch / "near").mkdir()
    stage = partial(
        _band_stage,
        parts=[str(part) for part in parts],
        settings=settings,
        shards=shards,
        texts=texts,
        scratch=scratch,
        runs=runs,
    )
    counts = run_shares(stage, list(range(bands)), workers, options)
    counts["keys sent"] = bands * len(entries.row)
    check_counts("near pairs", counts, "keys sent", ["keys"])
    verify_stage = partial(
        _verify_stage,
        parts=[str(part) for part in parts],
        settings=settings,
        scratch=scratch,
    )
    counts |= run_shares(verify_stage, list(range(shards)), workers, options)
    check_counts("near pairs", counts, "candidates sent", ["candidates"])
    found = [np.load(file) for file in sorted((scratch / "near").glob("*.npy"))]
    return unpack(np.sort(np.concatenate([np.zeros(0, np.uint64), *found])))


def _band_stage(
    pipeline: beam.Pipeline,
    bands: Sequence[int],
    *,
    parts: Sequence[str],
    settings: DedupSettings,
    shards: int,
    texts: int,
    scratch: Path,
    runs: Path | None,
) -> None:
    """Some bands of all parts to files of candidates, by shard of the left text."""
    from pipelines.beam import add, beam

    count, rows = settings.bands()

    def keyed(piece: tuple[str, int, int]) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        part, start, stop = piece
        entries = Entries.load(scratch)
        mine = slice(*np.searchsorted(entries.row, [start, stop]))
        row, text, realm = entries.row[mine] - start, entries.text[mine], entries.realm[mine]
        signatures = minhash.matrix(read_signatures(Path(part))["signature"])
        for band in bands:
            key = entry_keys(signatures, row, realm, band, rows)
            shard = key % np.uint64(shards)
            for s in range(shards):
                yield (band, s), pa.table({"key": key[shard == s], "text": text[shard == s]})

    def paired(group: tuple[tuple[int, int], Iterable[pa.Table]]) -> None:
        (band, shard), tables = group
        key, text = (column.to_numpy() for column in pa.concat_tables(tables))
        add("keys", len(key))
        order = np.argsort(key)
        key, text = key[order], text[order]
        if runs is not None:
            save_run(runs, band, shard, key, text)
        packed = distinct(pack(*candidates(key, text, settings.bucket_limit)))
        add("candidates sent", len(packed))
        owner = (packed >> np.uint64(32)) * np.uint64(shards) // np.uint64(max(texts, 1))
        for s in range(shards):
            mine = packed[owner == s]
            np.save(scratch / "candidates" / str(s) / f"{band:03d}-{shard:04d}.npy", mine)

    _ = (
        pipeline
        | "Parts" >> beam.Create(_spans(parts))
        | "Band keys" >> beam.FlatMap(keyed).with_output_types(tuple[tuple[int, int], pa.Table])
        | "By band and shard" >> beam.GroupByKey()
        | "Candidates" >> beam.Map(paired)
    )


def _verify_stage(
    pipeline: beam.Pipeline,
    shards: Sequence[int],
    *,
    parts: Sequence[str],
    settings: DedupSettings,
    scratch: Path,
) -> None:
    """Some shards of candidates to files of near pairs."""
    from pipelines.beam import add, beam

    def verified(shard: int) -> None:
        entries = Entries.load(scratch)
        row_of = np.zeros(int(entries.text.max(initial=-1)) + 1, np.int64)
        row_of[entries.text] = entries.row
        files = sorted((scratch / "candidates" / str(shard)).glob("*.npy"))
        found = [np.load(file) for file in files]
        add("candidates", sum(map(len, found)))
        packed = distinct(np.concatenate([np.zeros(0, np.uint64), *found]))
        pairs = unpack(packed)
        near = verify(row_of[pairs], [Path(part) for part in parts], settings.threshold)
        np.save(scratch / "near" / f"{shard:04d}.npy", packed[near])

    _ = pipeline | "Shards" >> beam.Create(list(shards)) | "Verify" >> beam.Map(verified)


def entry_keys(
    signatures: np.ndarray, row: np.ndarray, realm: np.ndarray, band: int, rows: int
) -> np.ndarray:
    """Buckets of entries in one band, uint64 (n,): hashes of the band's minima and the realm."""
    hashed = band_keys(signatures[:, band * rows : (band + 1) * rows], 1, rows)[0]
    return ids.mix(hashed[row] ^ ids.mix(realm.astype(np.uint64)))


def save_run(runs: Path, band: int, shard: int, key: np.ndarray, text: np.ndarray) -> None:
    """Keep sorted band keys and the texts they belong to."""
    np.save(runs / f"{band:03d}-{shard:04d}.keys.npy", key)
    np.save(runs / f"{band:03d}-{shard:04d}.texts.npy", text.astype(np.uint32))


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
        keys: bucket of each entry, uint64 (n,); fastest when sorted.
        texts: its text, int64 (n,), distinct within a bucket.
        limit: in a larger bucket, each is compared with the smallest and the next `limit` - 1.
    """
    if (keys[1:] < keys[:-1]).any():
        order = np.argsort(keys)
        keys, texts = keys[order], texts[order]
    equal = keys[1:] == keys[:-1]
    shared = (np.append(equal, False) | np.append(False, equal))[: len(keys)]  # few are
    keys, texts = keys[shared], texts[shared]
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


def verify(rows: np.ndarray, parts: Sequence[Path], threshold: float) -> np.ndarray:
    """Whether the exact Jaccard similarity of pairs of texts reaches the threshold, bool (pairs,).

    Args:
        rows: the rows of both texts over all parts, int64 (pairs, 2); sorted is fastest.
        parts: folders made by `sketches.sketch`.
        threshold: 0..1.
    """
    near = np.zeros(len(rows), np.bool_)
    for at in range(0, len(rows), VERIFY_PAIRS):
        some = rows[at : at + VERIFY_PAIRS]
        read, place = np.unique(some, return_inverse=True)
        left, right = place.reshape(some.shape).T
        near[at : at + VERIFY_PAIRS] = (
            minhash.overlap(read_shingles(parts, read), left, right) >= threshold
        )
    return near


def pack(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Pairs of texts as one number each, uint64 (pairs,), in the same order."""
    return (left.astype(np.uint64) << np.uint64(32)) | right.astype(np.uint64)


def distinct(packed: np.ndarray) -> np.ndarray:
    """The distinct ones of packed pairs, ascending.

    `np.unique` hashes, which for numbers like these takes up to thirty times as long.
    """
    packed = np.sort(packed)
    return packed[np.append(True, packed[1:] != packed[:-1])[: len(packed)]]


def unpack(packed: np.ndarray) -> np.ndarray:
    """The pairs behind the numbers, int64 (pairs, 2)."""
    return np.stack([packed >> np.uint64(32), packed & LOW], axis=1).astype(np.int64)


def _spans(parts: Sequence[str]) -> list[tuple[str, int, int]]:
    """Each part with its first row over all parts and the row after its last."""
    sizes = [read_signatures(Path(part)).num_rows for part in parts]
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    return [(part, end - size, end) for part, size, end in zip(parts, sizes, ends, strict=True)]
