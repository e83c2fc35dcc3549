"""The truth, and how near to it clusters are: exact Jaccard similarity, pairs that go together."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import minhash
from pipelines.dedup import components
from pipelines.near import DedupSettings, band_keys, candidates

PARTS = 64


def true_clusters(documents: str, threshold: float = 0.8) -> np.ndarray:
    """Clusters by exact similarity of all pairs within families, int64 (rows,)."""
    table = pq.read_table(documents, columns=["text", "family"])
    family = table["family"].to_numpy()
    edges = []
    for part in range(PARTS):
        rows = np.flatnonzero(family % PARTS == part)
        order = rows[np.argsort(family[rows], kind="stable")]
        left, right = candidates(family[order].astype(np.uint64), np.arange(len(order)), 64)
        edges.append(_near(table, order, left, right, threshold))
    left, right = np.concatenate(edges).T
    return components(len(family), left, right)


def near_exhaustive_clusters(documents: str, threshold: float = 0.8) -> np.ndarray:
    """Clusters of documents without known families.

    Candidates come from 32 bands of 4 rows, which misses one pair of similarity 0.8 in ten
    million, and are then compared exactly.
    """
    table = pq.read_table(documents, columns=["text"])
    settings = DedupSettings()
    pieces = [
        minhash.signatures(minhash.shingles(batch["text"]), settings)
        for batch in table.to_batches(8192)
    ]
    keys = band_keys(np.concatenate(pieces), 32, 4)
    numbers = np.arange(len(table))
    edges = np.unique(
        np.concatenate([np.stack(candidates(key, numbers, 512), axis=1) for key in keys]), axis=0
    )
    found = _near(table, numbers, edges[:, 0], edges[:, 1], threshold)
    return components(len(table), found[:, 0], found[:, 1])


def agreement(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Precision and recall of `found` against `truth`, over pairs of rows in one cluster."""

    def pairs(label: np.ndarray) -> int:
        _, sizes = np.unique(label, return_counts=True)
        return int((sizes * (sizes - 1) // 2).sum())

    both = pairs(np.unique(np.stack([found, truth]), axis=1, return_inverse=True)[1])
    return both / max(pairs(found), 1), both / max(pairs(truth), 1)


def _near(
    table: pa.Table, rows: np.ndarray, left: np.ndarray, right: np.ndarray, threshold: float
) -> np.ndarray:
    """Those pairs, as numbers of the table's rows (pairs, 2), that are near."""
    texts = table["text"].take(pa.array(rows)).combine_chunks()
    sets = minhash.shingles(texts)
    near = minhash.jaccard(sets, left, right) >= threshold
    return np.stack([rows[left[near]], rows[right[near]]], axis=1)
