"""Answers like a text are found through datasketch's LSH, best first."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasketch import MinHash, MinHashLSH

from pipelines import ids
from pipelines.dedup import DedupSettings, dedup
from pipelines.errors import BadInputError
from pipelines.minhash import SCHEME, matrix, shingles, signatures
from pipelines.similar import similar

WORDS = [f"w{n}" for n in range(60)]


def changed(count):
    """60 words, the last `count` of them others: 56 - count of 56 + count shingles are shared."""
    return " ".join(WORDS[: 60 - count] + [f"x{n}" for n in range(count)])


TEXTS = [changed(n) for n in (0, 2, 6, 30, 60)] + ["", changed(0) + " "]
KEYS = [bytes([9 - n]) * 16 for n in range(len(TEXTS))]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("similar")
    table = pa.table(
        {
            "trajectory_id": ids.array(KEYS),
            "prompt_id": ids.array(KEYS),
            "source": ["s"] * len(TEXTS),
            "text": TEXTS,
        }
    )
    pq.write_table(table, folder / "in.parquet")
    return dedup([folder / "in.parquet"], DedupSettings(), folder).signatures


def look_up(wanted):
    keys = ids.storage(wanted).to_pylist()[::-1]
    return pa.table(
        {"trajectory_id": ids.array(keys), "text": [TEXTS[KEYS.index(k)] for k in keys]}
    )


def test_best_first_with_estimate_and_exact_similarity(stored):
    found = similar(changed(0), stored, texts=look_up)
    order = [KEYS.index(key) for key in ids.storage(found["trajectory_id"]).to_pylist()]
    assert order[:4] == [6, 0, 1, 2]  # of the equal ones the smaller id comes first
    assert 4 not in order
    exact = found["similarity"].to_pylist()
    assert exact[:4] == [1, 1, 54 / 58, 50 / 62]
    assert np.abs(found["estimate"].to_numpy() - exact).max() < 0.2


def test_signatures_of_an_index_are_looked_through_as_well(stored, tmp_path):
    whole = pq.read_table(stored.with_name("in.parquet"))
    for start, end in ((0, 2), (2, len(whole))):
        pq.write_table(whole.slice(start, end - start), tmp_path / "in.parquet")
        folder = tmp_path / "index"
        known = dedup([tmp_path / "in.parquet"], DedupSettings(), tmp_path, index=folder)
    assert similar(changed(0), known.signatures).equals(similar(changed(0), stored))


def test_top_and_no_texts(stored):
    found = similar(changed(0), stored, top=2)
    assert found.num_rows == 2
    assert found["similarity"].null_count == 2
    nothing = similar("something else altogether", stored, texts=look_up)
    assert nothing.num_rows == 0


def test_finds_what_an_index_of_all_answers_finds(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 8, 40)) for _ in range(400)]
    query = texts[0]
    texts += [" ".join(query.split()[n:]) for n in range(35)]
    keys = [rng.bytes(16) for _ in texts]
    table = pa.table({"trajectory_id": ids.array(keys), "prompt_id": ids.array(keys)})
    table = table.append_column("source", pa.array(["s"] * len(texts)))
    pq.write_table(table.append_column("text", pa.array(texts)), tmp_path / "in.parquet")
    stored = dedup([tmp_path / "in.parquet"], DedupSettings(), tmp_path).signatures

    lsh = MinHashLSH(num_perm=128, params=DedupSettings(threshold=0.5).bands())
    values = matrix(pq.read_table(stored)["signature"])
    for key, value in zip(keys, values, strict=True):
        lsh.insert(key, MinHash(hashvalues=value, scheme=SCHEME))
    wanted = signatures(shingles(pa.array([query])))[0]
    expected = set(lsh.query(MinHash(hashvalues=wanted, scheme=SCHEME)))
    found = similar(query, stored, top=1000)
    assert set(ids.storage(found["trajectory_id"]).to_pylist()) == expected
    assert len(expected) > 15


def test_what_cannot_be_asked_is_said(stored, tmp_path):
    with pytest.raises(BadInputError, match="no words to compare"):
        similar(" \u200b", stored)
    with pytest.raises(BadInputError, match="run it first"):
        similar("text", tmp_path / "none.parquet")
