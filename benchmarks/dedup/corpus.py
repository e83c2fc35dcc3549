"""Texts to deduplicate, with known truth: families of seeded edits of real (or made-up) answers.

Words are lower-case letters and digits with single spaces between, so that every tool's way of
cutting words gives the same shingles; documents of fewer than eight words are left out, for tools
differ there. `family` says whose edits a document is: documents of different families share
hardly a shingle. The number of edits aims at a Jaccard similarity drawn from 0.5 to 1.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import ids

WORD = re.compile(r"[^\W_]+")
MINIMUM = 8
ROWS = 50_000


def base_texts(data: Path | None, documents: int) -> list[str]:
    """What documents are made of: the answers of a folder, or without one made-up texts."""
    return real_texts(data) if data else made_up_texts(max(documents // 8, 100))


def real_texts(folder: Path) -> list[str]:
    """The distinct answers of a trajectories file, as words."""
    table = pq.read_table(folder / "trajectories.parquet", columns=["response"])
    seen = (
        " ".join(WORD.findall(text.lower()))
        for text in table["response"].unique().to_pylist()
        if text
    )
    return [text for text in dict.fromkeys(seen) if text.count(" ") >= MINIMUM - 1]


def made_up_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 8 to 300 words, frequent words more often."""
    rng = np.random.default_rng(seed)
    words = np.array([f"w{n}" for n in range(20_000)])
    frequency = 1 / np.arange(1, len(words) + 1)
    lengths = np.minimum(MINIMUM + rng.geometric(1 / 100, count), 300)
    drawn = rng.choice(words, lengths.sum(), p=frequency / frequency.sum())
    return [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]


def write_families(file: Path, base: list[str], count: int, seed: int = 0) -> None:
    """Write `count` documents: trajectory_id, prompt_id, source, text, family; order shuffled.

    Half of the families have one member, the others 2 to 12. A family begins with a text of
    `base`; where those are used up, with one of them in which every second word is replaced.
    """
    rng = np.random.default_rng(seed)
    vocabulary = sorted({word for text in base[:20_000] for word in text.split(" ")})
    texts: list[str] = []
    families: list[int] = []
    family = 0
    while len(texts) < count:
        words = base[family % len(base)].split(" ")
        if family >= len(base):
            places = rng.permutation(len(words))[: -(-len(words) // 2)]
            _replace(words, places, vocabulary, rng)
        size = 1 if rng.random() < 0.5 else min(2 + int(rng.geometric(0.4)) - 1, 12)
        for member in range(size):
            mine = list(words)
            if member and rng.random() > 0.1:
                target = rng.uniform(0.5, 1.0)
                shingles = len(words) - 4
                edits = round(shingles * (1 - target) / (1 + target) / 5)
                _replace(mine, rng.integers(0, len(words), edits), vocabulary, rng)
            texts.append(" ".join(mine))
            families.append(family)
        family += 1
    order = rng.permutation(len(texts))[:count]
    _write(file, [texts[i] for i in order], np.array(families)[order])


def write_plain(file: Path, texts: list[str]) -> None:
    """Write texts as they are, each a family of its own."""
    _write(file, texts, np.arange(len(texts)))


def shuffled(source: Path, target: Path, seed: int) -> None:
    """The same documents in another order."""
    table = pq.read_table(source)
    order = np.random.default_rng(seed).permutation(len(table))
    pq.write_table(table.take(pa.array(order)), target, row_group_size=ROWS)


def _replace(
    words: list[str], places: np.ndarray, vocabulary: list[str], rng: np.random.Generator
) -> None:
    for place, word in zip(
        places.tolist(), rng.integers(0, len(vocabulary), len(places)).tolist(), strict=True
    ):
        words[place] = vocabulary[word]


def _write(file: Path, texts: list[str], families: np.ndarray) -> None:
    rows = np.arange(len(texts), dtype=np.uint64)
    trajectory = np.stack([ids.mix(rows + np.uint64(1)), rows], axis=1)
    prompt = np.stack(
        [ids.mix(families.astype(np.uint64) // np.uint64(8) + np.uint64(7))] * 2, axis=1
    )
    table = pa.table(
        {
            "trajectory_id": _ids(trajectory),
            "prompt_id": _ids(prompt),
            "source": pa.array(np.full(len(texts), "bench", object), pa.string()),
            "text": pa.array(texts, pa.string()),
            "family": families,
        }
    )
    pq.write_table(table, file, row_group_size=ROWS)


def _ids(words: np.ndarray) -> pa.ExtensionArray:
    raw = pa.py_buffer(np.ascontiguousarray(words.astype(">u8")))
    kind = pa.binary(16)
    return pa.ExtensionArray.from_storage(
        pa.uuid(), pa.Array.from_buffers(kind, len(words), [None, raw])
    )


def row_numbers(table: pa.Table, duplicates: pa.Table) -> np.ndarray:
    """Cluster of each row of `table`, as the row of its representative, int64 (rows,)."""
    words = ids.words(table["trajectory_id"])
    order = np.argsort(words[:, 0])
    high = words[order, 0]

    def row_of(column: pa.ChunkedArray) -> np.ndarray:
        return order[np.searchsorted(high, ids.words(column)[:, 0])]

    label = np.arange(len(table))
    label[row_of(duplicates["trajectory_id"])] = row_of(duplicates["cluster_id"])
    return label
