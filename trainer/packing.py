"""Groups as token ids, made once and kept flat, and which groups make which batch.

A group's sequences are split into the prefix that they share and what each has of its own, so a
layout may encode the prefix once; `model` decides whether it does.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data import stream_groups, texts_of
from trainer.errors import BadGroupsError
from trainer.template import Template, common_prefix

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Ids:
    """Token ids of many groups, flat: per group one shared prefix, then one suffix a candidate.

    Piece p is `tokens[starts[p] : starts[p + 1]]`; group g owns the pieces from `first[g]` (its
    prefix) up to `first[g + 1]`; candidate i of group g has rank `ranks[first[g] - g + i]`.
    """

    tokens: np.ndarray
    starts: np.ndarray
    first: np.ndarray
    ranks: np.ndarray
    group_ids: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.first) - 1

    def prefix(self, group: int) -> np.ndarray:
        """Ids (P,) that all candidates of the group begin with."""
        return self._piece(int(self.first[group]))

    def suffixes(self, group: int) -> list[np.ndarray]:
        """Per candidate the ids that follow the prefix, each at least one."""
        pieces = range(int(self.first[group]) + 1, int(self.first[group + 1]))
        return [self._piece(piece) for piece in pieces]

    def group_ranks(self, group: int) -> np.ndarray:
        """Ranks (K,) of the group's candidates."""
        return self.ranks[self.first[group] - group : self.first[group + 1] - group - 1]

    def digest(self) -> str:
        """A hash of all ids, their division into pieces and groups, and the ranks."""
        total = hashlib.blake2b(digest_size=16)
        for array in (self.tokens, self.starts, self.first, self.ranks):
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()

    def lengths(self) -> np.ndarray:
        """Per group the ids of its longest sequence."""
        sizes = np.diff(self.starts)
        longest = [sizes[a + 1 : b].max(initial=0) for a, b in pairwise(self.first)]
        return sizes[self.first[:-1]] + np.asarray(longest, dtype=np.int64)

    def official(self) -> np.ndarray:
        """Per group the ids the official code runs: both sequences whole, for every pair."""
        whole, group, _ = self._candidates()
        partners = [_partners(self.group_ranks(g)) for g in range(len(self))]
        return np.bincount(group, whole * np.concatenate(partners), len(self)).astype(np.int64)

    def seen(self) -> np.ndarray:
        """Per group the pairs of ids of which one sees the other, its prefix counted once."""
        whole, group, prefix = self._candidates()
        own = whole - prefix[group]
        each = own * prefix[group] + own * (own + 1) / 2
        return prefix * (prefix + 1) / 2 + np.bincount(group, each, len(self))

    def distinct(self) -> np.ndarray:
        """Per group its ids, the shared prefix counted once."""
        whole, group, prefix = self._candidates()
        return prefix + np.bincount(group, whole - prefix[group], len(self)).astype(np.int64)

    def _candidates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per candidate its ids and its group's number; per group the ids of its prefix."""
        sizes = np.diff(self.starts)
        prefix = sizes[self.first[:-1]]
        group = np.repeat(np.arange(len(self)), np.diff(self.first) - 1)
        return np.delete(sizes, self.first[:-1]) + prefix[group], group, prefix

    def _piece(self, piece: int) -> np.ndarray:
        return self.tokens[self.starts[piece] : self.starts[piece + 1]]


class IdsBuilder:
    """Collects groups' sequences into `Ids`."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._sizes: list[int] = []
        self._first = [0]
        self._ranks: list[int] = []
        self._group_ids: list[str] = []

    def add(self, sequences: Sequence[Sequence[int]], ranks: Sequence[int], group: str) -> None:
        """Append one group, splitting off the prefix that its sequences share."""
        shared = common_prefix(sequences)
        pieces = [sequences[0][:shared], *(ids[shared:] for ids in sequences)]
        self._tokens += [np.asarray(piece, dtype=np.int32) for piece in pieces]
        self._sizes += [len(piece) for piece in pieces]
        self._first.append(len(self._sizes))
        self._ranks += ranks
        self._group_ids.append(group)

    def build(self) -> Ids:
        """Everything added so far, flat."""
        return Ids(
            tokens=np.concatenate([*self._tokens, np.empty(0, np.int32)]),
            starts=np.concatenate([[0], np.cumsum(self._sizes, dtype=np.int64)]).astype(np.int64),
            first=np.asarray(self._first, dtype=np.int64),
            ranks=np.asarray(self._ranks, dtype=np.int32),
            group_ids=self._group_ids,
        )


def tokenise(
    paths: Sequence[Path],
    template: Template,
    *,
    split: str = "train",
    progress: Progress | None = None,
) -> tuple[Ids, dict[str, int]]:
    """Ids of every group of a split, and how many rows were read, kept and left out, by reason.

    Left out are groups of other splits, groups in which no candidate is better than another
    (`no_pair`), and groups whose better candidate has the ids of a worse one, as cutting long
    texts can bring about (`equal_ids`).
    """
    builder = IdsBuilder()
    counts = Counter({"read": 0, "kept": 0, "other_split": 0, "no_pair": 0, "equal_ids": 0})
    for done, path in enumerate(paths):
        for table in stream_groups(path):
            counts["read"] += len(table)
            mine = np.asarray([s == split for s in table.column("split").to_pylist()], dtype=bool)
            counts["other_split"] += int((~mine).sum())
            table = table.filter(pa.array(mine))
            names = table.column("group_id").to_pylist()
            ranked = [[c["rank"] for c in row] for row in table.column("candidates").to_pylist()]
            encoded = template.encode(texts_of(table), one_prompt=True)
            for name, ranks, sequences in zip(names, ranked, encoded, strict=True):
                reason = _unusable(ranks, sequences)
                counts[reason or "kept"] += 1
                if not reason:
                    builder.add(sequences, ranks, str(name))
            if progress:
                progress(done, len(paths), f"{counts['read']} groups read")
    if counts["read"] != sum(counts[key] for key in counts if key != "read"):
        msg = f"groups were lost while reading: {dict(counts)}"
        raise BadGroupsError(msg)
    return builder.build(), dict(counts)


def _partners(ranks: np.ndarray) -> np.ndarray:
    """Per candidate the pairs of its group that it is in."""
    return (ranks[:, None] != ranks[None, :]).sum(axis=1)


def _unusable(ranks: list[int], sequences: list[list[int]]) -> str | None:
    """Why a group cannot be learned from, if it cannot."""
    if len(set(ranks)) < 2:
        return "no_pair"
    best: dict[tuple[int, ...], int] = {}
    for rank, ids in zip(ranks, sequences, strict=True):
        if best.setdefault(tuple(ids), rank) != rank:
            return "equal_ids"
    return None


def batches(
    lengths: np.ndarray, size: int, *, seed: int, epoch: int, window: int = 8
) -> list[np.ndarray]:
    """Which groups make which optimiser step of an epoch: a function of its arguments alone.

    Groups are shuffled, sorted by length within windows of `window` batches so that little is
    padded, cut into batches of `size`, and the batches shuffled again.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    cut = []
    for start in range(0, len(order), size * window):
        part = order[start : start + size * window]
        part = part[np.argsort(lengths[part], kind="stable")]
        cut += [part[i : i + size] for i in range(0, len(part), size)]
    return [cut[i] for i in generator.permutation(len(cut))]


def costs(ids: Ids, layout: str, width: int) -> np.ndarray:
    """What each group costs in a layout, counted in ids of a network of that width.

    An id's products in a layer are about 24 E^2 operations, a pair of ids' in attention 4 E.
    Separate sequences pay for their padding too; see `microbatches`.
    """
    if layout == "separate":
        candidates = np.diff(ids.first) - 1
        longest = ids.lengths()
        return candidates * (longest + longest**2 / 2 / (6 * width))
    return ids.distinct() + ids.seen() / (6 * width)


def microbatches(costs: np.ndarray, budget: int, *, padded: bool) -> list[np.ndarray]:
    """Positions of one step's groups in parts whose cost stays within `budget` ids.

    Where rows are padded, groups of like length lie together and each costs what the dearest does;
    otherwise the dearest come first and each goes into the first part with room. A group dearer
    than the budget has a part of its own.
    """
    parts: list[list[int]] = []
    loads: list[float] = []
    if padded:
        for position in np.argsort(costs, kind="stable"):
            if parts and costs[position] * (len(parts[-1]) + 1) <= budget:
                parts[-1].append(int(position))
            else:
                parts.append([int(position)])
        return [np.asarray(part) for part in parts]
    for position in np.argsort(-costs, kind="stable"):
        cost = float(costs[position])
        found = next((i for i, load in enumerate(loads) if load + cost <= budget), len(parts))
        if found == len(parts):
            parts.append([])
            loads.append(0.0)
        parts[found].append(int(position))
        loads[found] += cost
    return [np.asarray(part) for part in parts]


def shares(costs: np.ndarray, processes: int) -> list[np.ndarray]:
    """Positions of one step's groups for each process, of about the same cost together."""
    parts: list[list[int]] = [[] for _ in range(processes)]
    loads = np.zeros(processes)
    for position in np.argsort(-costs, kind="stable"):
        least = int(loads.argmin())
        parts[least].append(int(position))
        loads[least] += costs[position]
    return [np.asarray(part, dtype=np.int64) for part in parts]
