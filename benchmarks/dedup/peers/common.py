"""What the scripts around the peers share: reading, shingles, verification, clusters."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

WORDS, PERMUTATIONS, BANDS, ROWS, THRESHOLD = 5, 128, 16, 8, 0.8


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["signatures", "all"])
    parser.add_argument("documents", type=Path)
    parser.add_argument("out", type=Path)
    return parser.parse_args()


def batches(documents: Path, rows: int = 8192) -> Iterator[list[str]]:
    for batch in pq.ParquetFile(documents).iter_batches(rows, columns=["text"]):
        yield batch["text"].to_pylist()


def shingles(text: str) -> list[str]:
    words = text.split(" ")
    return [" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)]


def verified(
    pairs: Iterable[tuple[int, int]], hashes: list[np.ndarray]
) -> Iterator[tuple[int, int]]:
    """Those pairs whose sets of shingle hashes reach the threshold; sorted pairs are fastest."""
    last, left = -1, set()
    for a, b in pairs:
        if a != last:
            last, left = a, set(hashes[a].tolist())
        right = set(hashes[b].tolist())
        common = len(left & right)
        if common >= THRESHOLD * (len(left) + len(right) - common):
            yield a, b


class Clusters:
    """Union-find, each set named by its smallest member."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def find(self, x: int) -> int:
        while self.parent[x] != x:
            self.parent[x] = self.parent[self.parent[x]]
            x = self.parent[x]
        return x

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[max(a, b)] = min(a, b)

    def save(self, out: Path) -> None:
        np.save(out / "clusters.npy", [self.find(x) for x in range(len(self.parent))])
