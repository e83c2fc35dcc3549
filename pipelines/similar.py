"""Which answers are like a given text: the question behind `polar similar TEXT`.

datasketch's MinHashLSH answers it. Its index is made at each question, of those answers alone that
can share a band with the text: the ones with at least as many equal minima as a band has rows.
The candidates are those of an index of all answers, but nothing has to be kept fresh, and 140,000
answers take under a second; an index of all of them takes a gigabyte and tens of seconds to make,
and nearly as long to load. Signatures are read row group by row group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import ids, minhash
from pipelines.errors import BadInputError
from pipelines.minhash import MinHashSettings
from pipelines.near import DedupSettings

ANSWERS = pa.schema(
    [
        pa.field("trajectory_id", pa.uuid(), nullable=False),
        pa.field("estimate", pa.float64(), nullable=False),
        pa.field("similarity", pa.float64()),
    ]
)


def similar(
    text: str,
    signatures: Path,
    *,
    top: int = 10,
    threshold: float = 0.5,
    texts: Callable[[pa.Array], pa.Table] | None = None,
) -> pa.Table:
    """The answers most like `text`: the best by estimate, sorted by similarity where it is known.

    Args:
        text: what to look for.
        signatures: what `dedup` left, a Parquet file or a folder of them.
        top: answers at most.
        threshold: Jaccard similarity from which an answer is sure enough to be found; less similar
            ones are found by chance.
        texts: looks up trajectory ids and gives (trajectory_id, text) in any order; with it the
            exact similarity is computed too.

    Returns:
        (trajectory_id, estimate, similarity): MinHash estimate and exact Jaccard of the shingle
        sets, 0..1; similarity is null without `texts`.

    Raises:
        BadInputError: there are no signatures, or the text has no words.
    """
    from datasketch import MinHash, MinHashLSH

    parts = sorted(signatures.glob("*.parquet")) if signatures.is_dir() else [signatures]
    if not parts or not parts[0].is_file():
        msg = f"{signatures}: no signatures; they are made by the dedup stage, so run it first"
        raise BadInputError(msg)
    settings = MinHashSettings.of(pq.read_schema(parts[0]))
    sets = minhash.shingles(pa.array([text]), settings.words)
    if not len(sets.hashes):
        msg = f"the text {text!r} has no words to compare; give some"
        raise BadInputError(msg)
    wanted = minhash.signatures(sets, settings)[0]
    bands, rows = DedupSettings(permutations=settings.permutations, threshold=threshold).bands()
    trajectory, values = _sharing(parts, wanted, rows)
    lsh = MinHashLSH(num_perm=settings.permutations, params=(bands, rows))
    permutations = minhash.permutations(settings)

    def sketch(hashvalues: np.ndarray) -> MinHash:
        return MinHash(
            seed=settings.seed,
            hashvalues=hashvalues,
            permutations=permutations,
            scheme=minhash.SCHEME,
        )

    for row, value in enumerate(values):
        lsh.insert(row, sketch(value), check_duplication=False)
    found = lsh.query(sketch(wanted))
    estimate = {trajectory[row]: float((values[row] == wanted).mean()) for row in found}
    best = sorted(estimate, key=lambda key: (-estimate[key], key))[:top]
    exact = _exact(text, texts(ids.array(best)), settings) if texts and best else {}
    best.sort(key=lambda key: (-exact.get(key, 0.0), -estimate[key], key))
    return pa.Table.from_arrays(
        [
            ids.array(best),
            pa.array([estimate[key] for key in best], pa.float64()),
            pa.array([exact.get(key) for key in best], pa.float64()),
        ],
        schema=ANSWERS,
    )


def _sharing(
    parts: Sequence[Path], wanted: np.ndarray, minima: int
) -> tuple[list[bytes], np.ndarray]:
    """Ids and signatures of the answers with at least so many minima of the wanted signature."""
    trajectory: list[bytes] = []
    values = [np.zeros((0, len(wanted)), np.uint32)]
    for file in map(pq.ParquetFile, parts):
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            block = minhash.matrix(table["signature"])
            near = np.flatnonzero(np.count_nonzero(block == wanted, axis=1) >= minima)
            values.append(block[near])
            trajectory += ids.storage(table["trajectory_id"]).take(pa.array(near)).to_pylist()
    return trajectory, np.concatenate(values)


def _exact(text: str, answers: pa.Table, settings: MinHashSettings) -> dict[bytes, float]:
    """Exact Jaccard similarity to each answer, by its id."""
    every = pa.array([text, *answers["text"].to_pylist()])
    right = np.arange(1, len(every))
    values = minhash.jaccard(minhash.shingles(every, settings.words), np.zeros_like(right), right)
    return dict(
        zip(ids.storage(answers["trajectory_id"]).to_pylist(), values.tolist(), strict=True)
    )
