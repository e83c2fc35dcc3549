"""What dedup knows, kept in a folder, so that new answers alone are looked at.

The folder holds the parts (`sketches.py`), sorted band keys, the number of each answer's text, the
near pairs, and signatures for those who read them elsewhere. `state.json` says which of its files
count; it is replaced last, so a run that ends early leaves the index as it was, and the next one
removes what it left.

New answers join the buckets of known ones. A bucket that none of them enters has the candidates it
had. In one that they enter, candidates are taken twice, with and without the new entries; what is
added is verified, and a near pair that went (for in a large bucket each text is compared with its
next ones only, and the new ones push in between) is dropped unless another bucket still has it.
So the near pairs are exactly those of a full run, whatever came in how many steps. Searching costs
a few steps for each new entry in each run of band keys; nothing known is read, sorted or hashed
again. With many small runs that becomes slow: an index made anew from all answers has one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines import ids, minhash
from pipelines.errors import BadInputError
from pipelines.near import (
    DedupSettings,
    Entries,
    candidates,
    distinct,
    entry_keys,
    pack,
    save_run,
    unpack,
    verify,
)
from pipelines.sketches import read_rows, read_signatures

STATE = "state.json"
VERSION = 3


@dataclass(kw_only=True)
class Index:
    """An index folder and what of it counts; empty where nothing was committed yet.

    Attributes:
        folder: where it is.
        settings: what it was made with.
        parts: folders of `sketches.sketch`, in order.
        runs: folders with sorted band keys, one for each commit.
        texts: number of the text of each row, int64 (rows,); -1 for an empty one.
        edges: near pairs of texts, int64 (pairs, 2).
    """

    folder: Path
    settings: DedupSettings
    parts: list[Path] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    texts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    edges: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    @staticmethod
    def open(folder: Path, settings: DedupSettings) -> Index:
        """Read an index, or begin one.

        Raises:
            BadInputError: it was made with other settings.
        """
        index = Index(folder=folder, settings=settings)
        if (folder / STATE).is_file():
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            wanted = _recipe(settings)
            if state["recipe"] != wanted:
                msg = (
                    f"{folder}: this index was made with {state['recipe']}, wanted is {wanted}; "
                    "remove the folder to make it anew from all answers"
                )
                raise BadInputError(msg)
            index.parts = [index.parts_folder / name for name in state["parts"]]
            index.runs = [folder / "runs" / name for name in state["runs"]]
            index.texts = np.load(folder / state["texts"])
            index.edges = np.load(folder / state["edges"])
        counted = {path.name for path in [*index.parts, *index.runs]}
        for parent in (index.parts_folder, folder / "runs"):
            parent.mkdir(parents=True, exist_ok=True)
            for path in parent.iterdir():
                if path.name not in counted:
                    shutil.rmtree(path)
        for path in index.signatures_folder.glob("*"):
            if path.stem not in counted:
                path.unlink()
        index.runs_folder.mkdir()
        return index

    @property
    def rows(self) -> int:
        """How many answers it holds."""
        return len(self.texts)

    @property
    def parts_folder(self) -> Path:
        """Where parts are."""
        return self.folder / "parts"

    @property
    def runs_folder(self) -> Path:
        """Where the band keys of the next commit go."""
        return self.folder / "runs" / f"run-{len(self.runs):06d}"

    @property
    def signatures_folder(self) -> Path:
        """Parquet files (trajectory_id, signature), one for each commit."""
        return self.folder / "signatures"

    @property
    def signatures_file(self) -> Path:
        """Where the signatures of the next commit go."""
        return self.signatures_folder / f"{self.runs_folder.name}.parquet"

    def answers(self) -> pa.Table:
        """Rows of schema `sketches.SUMMARY`: which answers it holds, and hashes of their texts."""
        return read_rows(self.parts)

    def commit(self, parts: Sequence[Path], texts: np.ndarray, edges: np.ndarray) -> None:
        """Make new parts, the band keys in `runs_folder` and the near pairs count."""
        number = len(self.runs)
        runs = [*self.runs, self.runs_folder]
        names = {"texts": f"texts-{number:06d}.npy", "edges": f"edges-{number:06d}.npy"}
        np.save(self.folder / names["texts"], texts)
        np.save(self.folder / names["edges"], edges)
        state = {
            "recipe": _recipe(self.settings),
            "parts": [part.name for part in parts],
            "runs": [run.name for run in runs],
            **names,
        }
        partial = self.folder / f"{STATE}.tmp"
        partial.write_text(json.dumps(state, indent=1), encoding="utf-8")
        partial.replace(self.folder / STATE)
        self.parts, self.runs, self.texts, self.edges = list(parts), runs, texts, edges
        for stale in [*self.folder.glob("texts-*.npy"), *self.folder.glob("edges-*.npy")]:
            if stale.name not in names.values():
                stale.unlink()


def new_answers(folder: Path, settings: DedupSettings, present: pa.Table) -> np.ndarray | None:
    """Which answers an index lacks, as row numbers of `present`.

    Args:
        folder: of the index.
        settings: that it must have been made with.
        present: trajectory_id and content_hash of all answers that there are.

    Returns:
        None if the index cannot be added to: there is none, or other settings made it, or it holds
        answers that are gone or now say something else.
    """
    try:
        held = Index.open(folder, settings).answers()
    except BadInputError:
        return None
    if not len(held):
        return None
    both = [
        np.column_stack([ids.words(table["trajectory_id"]), ids.words(table[content])])
        for table, content in ((held, "digest"), (present, "content_hash"))
    ]
    every = np.concatenate(both)
    order = np.lexsort(every.T[::-1])
    equal = (every[order[1:]] == every[order[:-1]]).all(axis=1)
    if np.count_nonzero(equal) != len(held):
        return None
    new = np.ones(len(every), np.bool_)
    new[order[1:][equal]] = new[order[:-1][equal]] = False
    return np.flatnonzero(new[len(held) :])


def match_texts(known: Index, rows: pa.Table) -> np.ndarray:
    """The number of each row's text, int64 (rows,); -1 for an empty one.

    Known texts keep their numbers; new ones get the next, in order of their hashes.
    """
    digests = ids.words(rows["digest"])
    empty = rows["empty"].to_numpy()
    new = known.rows + np.flatnonzero(~empty[known.rows :])
    order = new[ids.order(digests[new])]
    high = digests[order, 0]
    texts = np.concatenate([known.texts, np.full(len(rows) - known.rows, -1)])
    # Of the known rows few have the high word of a new one, and those are compared in full.
    place = np.searchsorted(high, digests[: known.rows, 0])
    hit = high[np.minimum(place, len(high) - 1)] == digests[: known.rows, 0] if len(high) else place
    old = np.flatnonzero(hit & (known.texts >= 0)) if len(high) else place[:0]
    every = np.concatenate([old, order])
    every = every[ids.order(digests[every])]  # known rows are the smaller ones: they come first
    begins = np.append(True, (digests[every[1:]] != digests[every[:-1]]).any(axis=1))[: len(every)]
    first = every[begins]
    number = texts[first]
    fresh = number < 0
    number[fresh] = known.texts.max(initial=-1) + 1 + np.arange(np.count_nonzero(fresh))
    texts[every] = number[np.cumsum(begins) - 1]
    return texts


def find_more(
    known: Index,
    parts: Sequence[Path],
    rows: pa.Table,
    texts: np.ndarray,
    entries: Entries,
    settings: DedupSettings,
) -> np.ndarray:
    """The near pairs of all texts, int64 (pairs, 2), from those of the known ones.

    Args:
        known: the index; the sorted keys of the new entries are left in its `runs_folder`.
        parts: its parts and the new ones.
        rows: all rows.
        texts: number of each row's text.
        entries: those that the new rows bring.
        settings: threshold, bands and bucket limit.
    """
    bands, _ = settings.bands()
    shown = np.flatnonzero(texts >= 0)[::-1]
    row_of = np.zeros(texts.max(initial=-1) + 1, np.int64)
    row_of[texts[shown]] = shown
    digests = ids.words(rows["digest"])

    def pairs(key: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Candidates of whole buckets; their order is that of the texts' hashes."""
        some, place = np.unique(text, return_inverse=True)
        by_hash = ids.order(digests[row_of[some]])
        rank = np.empty(len(some), np.int64)
        rank[by_hash] = np.arange(len(some))
        left, right = (
            some[by_hash[x]] for x in candidates(key, rank[place], settings.bucket_limit)
        )
        return pack(np.minimum(left, right), np.maximum(left, right))

    before, after = [], []
    for band, key, text in _new_keys(parts[len(known.parts) :], known.rows, entries, settings):
        save_run(known.runs_folder, band, 0, key, text)
        old_key, old_text = _members(known.runs, band, partial(_spans, wanted=key))
        before.append(pairs(old_key, old_text))
        after.append(pairs(np.append(old_key, key), np.append(old_text, text)))
    had, has = (distinct(np.concatenate(found)) for found in (before, after))
    edges = pack(known.edges[:, 0], known.edges[:, 1])
    gone = np.setdiff1d(had, has, assume_unique=True)
    lost = np.intersect1d(gone, edges, assume_unique=True)
    if len(lost):
        asked = np.unique(unpack(lost))
        runs = [*known.runs, known.runs_folder]
        for band in range(bands):
            key, text = _members(runs, band, lambda keys: slice(None))
            wanted = np.unique(key[np.isin(text, asked)])
            mine = np.isin(key, wanted)
            lost = np.setdiff1d(lost, pairs(key[mine], text[mine]))
    fresh = np.setdiff1d(has, had, assume_unique=True)
    near = verify(row_of[unpack(fresh)], parts, settings.threshold)
    left = np.setdiff1d(edges, lost, assume_unique=True)
    return unpack(distinct(np.append(left, fresh[near])))


def _new_keys(
    parts: Sequence[Path], first: int, entries: Entries, settings: DedupSettings
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Band, sorted keys and texts of the new entries, whose rows are those of the new parts."""
    bands, rows = settings.bands()
    found: list[list[np.ndarray]] = [[] for _ in range(bands)]
    texts = []
    for part in parts:
        signatures = minhash.matrix(read_signatures(part)["signature"])
        mine = slice(*np.searchsorted(entries.row, [first, first + len(signatures)]))
        texts.append(entries.text[mine])
        for band in range(bands):
            found[band].append(
                entry_keys(signatures, entries.row[mine] - first, entries.realm[mine], band, rows)
            )
        first += len(signatures)
    text = np.concatenate([np.zeros(0, np.int64), *texts])
    result = []
    for band, keys in enumerate(found):
        key = np.concatenate([np.zeros(0, np.uint64), *keys])
        order = np.argsort(key)
        result.append((band, key[order], text[order]))
    return result


def _members(
    runs: Sequence[Path], band: int, choose: Callable[[np.ndarray], np.ndarray | slice]
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and texts of those entries of a band that `choose` picks from each sorted run."""
    keys, texts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for run in runs:
        for file in sorted(run.glob(f"{band:03d}-*.keys.npy")):
            stored = np.load(file, mmap_mode="r")
            chosen = choose(stored)
            keys.append(np.asarray(stored[chosen]))
            of = np.load(file.with_name(file.name.replace("keys", "texts")), mmap_mode="r")
            texts.append(np.asarray(of[chosen]).astype(np.int64))
    return np.concatenate(keys), np.concatenate(texts)


def _spans(stored: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Places in sorted `stored` of the keys that are in sorted `wanted`."""
    wanted = wanted[np.append(True, wanted[1:] != wanted[:-1])[: len(wanted)]]
    low = np.searchsorted(stored, wanted)
    sizes = np.searchsorted(stored, wanted, side="right") - low
    ends = np.cumsum(sizes)
    return np.repeat(low - (ends - sizes), sizes) + np.arange(sizes.sum())


def _recipe(settings: DedupSettings) -> dict[str, object]:
    return {"version": VERSION, **settings.model_dump()}
