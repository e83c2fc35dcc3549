"""Repeats are found, verified and clustered the same way whatever the order; nothing is lost."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import dedup as module
from pipelines import ids, near, schemas
from pipelines.beam import CountMismatchError
from pipelines.dedup import DedupSettings, dedup
from pipelines.dedup_index import Index, new_answers
from pipelines.errors import BadInputError
from pipelines.minhash import jaccard, matrix, shingles, signatures

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
NEAR = LONG + " sixteen"  # 11 of 12 shingles: 0.92
FAR = LONG.replace("eight", "acht")  # 6 of 16


def number(value):
    return value.to_bytes(16, "big")


def write(path, rows, row_group_size=1000):
    """`rows`: (trajectory number, prompt number, source, text)."""
    trajectory, prompt, source, text = zip(*rows, strict=True) if rows else ((), (), (), ())
    table = pa.table(
        {
            "trajectory_id": ids.array(map(number, trajectory)),
            "prompt_id": ids.array(map(number, prompt)),
            "source": pa.array(source, pa.string()),
            "text": pa.array(text, pa.string()),
        }
    )
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def clusters(result, scope):
    """{cluster number: (kind, member numbers)}, after a check of the columns that follow."""
    found = {}
    for row in result.duplicates.to_pylist():
        if row["scope"] != scope:
            continue
        cluster, member = int(row["cluster_id"]), int(row["trajectory_id"])
        kind, members = found.setdefault(cluster, (row["kind"], []))
        members.append(member)
        assert row["kind"] == kind
        assert row["representative"] == (member == cluster)
    for row in result.duplicates.filter(pc.equal(result.duplicates["scope"], scope)).to_pylist():
        assert row["size"] == len(found[int(row["cluster_id"])][1])
    return found


def books(result, source):
    rows = [row for row in result.counts.to_pylist() if row["source"] == source]
    return {row["reason"] or row["what"]: row["rows"] for row in rows}


def corpus(seed=0, families=40):
    """Families of near-equal texts over a few prompts, some identical, some empty, shuffled."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(families):
        words = [f"w{n}" for n in rng.integers(0, 3000, rng.integers(3, 60))]
        for _ in range(rng.integers(1, 6)):
            mine = list(words)
            for _ in range(rng.integers(0, 3)):
                mine[rng.integers(len(mine))] = f"w{rng.integers(3000)}"
            rows.append(" ".join(mine))
    rows += ["", " \n", "\u200b", "yes", "yes", "Yes", "no"]
    numbers = rng.permutation(len(rows)) + 1
    return [
        (int(n), int(rng.integers(1, 5)), "abc"[n % 3], text)
        for n, text in zip(numbers, rows, strict=True)
    ]


def test_identical_and_near_texts_within_a_prompt_and_across(tmp_path):
    rows = [
        (1, 1, "s", LONG),
        (2, 1, "s", LONG),
        (3, 1, "s", NEAR),
        (4, 1, "s", FAR),
        (5, 2, "s", NEAR),
        (6, 2, "s", "short one"),
        (7, 3, "s", "short one"),
        (8, 3, "s", "Short  one"),
        (9, 3, "s", " \u200b "),
        (10, 3, "s", ""),
        (11, 3, "s", ""),
    ]
    result = dedup([write(tmp_path / "in.parquet", rows)], DedupSettings(), tmp_path / "work")
    assert clusters(result, "prompt") == {1: ("near", [1, 2, 3]), 7: ("near", [7, 8])}
    assert clusters(result, "corpus") == {1: ("near", [1, 2, 3, 5]), 6: ("near", [6, 7, 8])}
    assert books(result, "s") == {"in": 11, "out": 5, "empty": 3, "exact": 1, "near": 2}
    assert result.duplicates.schema == schemas.DUPLICATES.schema
    assert result.counts.schema == schemas.COUNTS.schema


def test_only_identical_texts_make_an_exact_cluster(tmp_path):
    rows = [(3, 1, "s", LONG), (1, 1, "s", LONG), (2, 2, "t", LONG)]
    result = dedup([write(tmp_path / "in.parquet", rows)], DedupSettings(), tmp_path)
    assert clusters(result, "prompt") == {1: ("exact", [1, 3])}
    assert clusters(result, "corpus") == {1: ("exact", [1, 2, 3])}
    assert books(result, "s") == {"in": 2, "out": 1, "empty": 0, "exact": 1, "near": 0}
    assert books(result, "t") == {"in": 1, "out": 1, "empty": 0, "exact": 0, "near": 0}


def test_texts_of_other_prompts_do_not_join_a_prompts_answers(tmp_path):
    """a ~ b ~ c, a and c too far apart: one cluster only where all three are present."""
    words = [f"w{n}" for n in range(40)]
    a, b, c = " ".join(words[:36]), " ".join(words[2:38]), " ".join(words[4:])
    left, right = np.array([0, 1, 0]), np.array([1, 2, 2])
    assert (jaccard(shingles(pa.array([a, b, c])), left, right) >= 0.85).tolist() == [1, 1, 0]
    rows = [(1, 1, "s", a), (2, 2, "s", b), (3, 1, "s", c)]
    strict = DedupSettings(threshold=0.85)
    result = dedup([write(tmp_path / "in.parquet", rows)], strict, tmp_path)
    assert clusters(result, "prompt") == {}
    assert clusters(result, "corpus") == {1: ("near", [1, 2, 3])}


@pytest.mark.parametrize("seed", range(3))
def test_order_files_and_batches_change_nothing(tmp_path, monkeypatch, seed):
    rows = corpus(seed)
    expected = dedup([write(tmp_path / "0.parquet", rows)], DedupSettings(), tmp_path / "a")
    order = np.random.default_rng(seed).permutation(len(rows))
    shuffled = [rows[i] for i in order]
    files = [
        write(tmp_path / "1.parquet", shuffled[:50], 7),
        write(tmp_path / "2.parquet", [], 7),
        write(tmp_path / "3.parquet", shuffled[50:], 1000),
    ]
    monkeypatch.setattr("pipelines.sketches.BATCH_ROWS", 16)
    monkeypatch.setattr("pipelines.sketches.PART_ROWS", 100)
    monkeypatch.setattr("pipelines.near.SHARD_KEYS", 50)
    monkeypatch.setattr("pipelines.near.VERIFY_PAIRS", 11)
    result = dedup(files, DedupSettings(), tmp_path / "b")
    assert result.duplicates.equals(expected.duplicates)
    assert result.counts.equals(expected.counts)
    before, after = (pq.read_table(r.signatures) for r in (expected, result))
    assert ids.storage(after["trajectory_id"]).to_pylist() == [number(row[0]) for row in shuffled]
    assert np.array_equal(matrix(after["signature"]), matrix(before["signature"])[order])


def test_clusters_are_those_of_all_pairs_compared(tmp_path):
    rows = sorted(corpus(families=60))
    result = dedup([write(tmp_path / "in.parquet", rows)], DedupSettings(), tmp_path)
    texts = [text for *_, text in rows]
    left, right = np.triu_indices(len(rows), 1)
    close = jaccard(shingles(pa.array(texts)), left, right) >= 0.8
    for scope in schemas.SCOPES:
        same = np.array([scope == "corpus" or a[1] == b[1] for a in rows for b in rows])
        joined = close & same.reshape(len(rows), -1)[left, right]
        smallest = module.components(len(rows), left[joined], right[joined])
        sizes = Counter(smallest.tolist())
        expected = {}
        for i, label in enumerate(smallest.tolist()):
            if sizes[label] > 1:
                expected.setdefault(rows[label][0], []).append(rows[i][0])
        found = {key: sorted(members) for key, (_, members) in clusters(result, scope).items()}
        assert found == expected
        assert len(found) > 5


def same_rows(result, expected):
    assert result.duplicates.equals(expected.duplicates)
    assert result.counts.equals(expected.counts)


def crowd(seed):
    """Hard for an index: small buckets fill up, large ones shift, texts come back elsewhere."""
    rng = np.random.default_rng(seed)
    rows = corpus(seed, families=12)
    base = [f"w{n}" for n in range(40)]
    for n in range(60):  # one loose family: many share a band, not all are near
        words = list(base)
        for place in rng.choice(40, rng.integers(0, 4), replace=False):
            words[place] = f"x{rng.integers(6)}"
        rows.append((1000 + n, int(rng.integers(1, 4)), "abc"[n % 3], " ".join(words)))
    return rows


def test_an_index_gives_what_a_full_run_gives():
    added_up(5, [70, 100], 5)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**16),
    st.lists(st.integers(1, 130), max_size=3),
    st.sampled_from([2, 5, 20, 64]),
)
def test_an_index_gives_what_a_full_run_gives_whatever_the_split(seed, cuts, limit):
    added_up(seed, cuts, limit)


def added_up(seed, cuts, limit):
    """An index filled in steps that end at `cuts`, compared with one run over everything."""
    rows = crowd(seed)
    order = np.random.default_rng(seed).permutation(len(rows))
    mixed = [rows[i] for i in order]
    config = DedupSettings(bucket_limit=limit)
    with TemporaryDirectory() as name:
        folder = Path(name)
        expected = dedup([write(folder / "all.parquet", rows)], config, folder / "full")
        bounds = sorted({0, *(min(cut, len(rows)) for cut in cuts), len(rows)})
        for step, (start, end) in enumerate(pairwise(bounds)):
            some = write(folder / f"{step}.parquet", mixed[start:end], 50)
            result = dedup([some], config, folder / "step", index=folder / "index")
        same_rows(result, expected)
        again = dedup([], config, folder / "step", index=folder / "index")
        same_rows(again, expected)
        stored = pq.read_table(again.signatures)
        assert ids.storage(stored["trajectory_id"]).to_pylist() == [number(r[0]) for r in mixed]
        whole = pq.read_table(expected.signatures)["signature"]
        by_id = {row: i for i, row in enumerate(r[0] for r in rows)}
        assert stored["signature"].equals(whole.take(pa.array([by_id[r[0]] for r in mixed])))


def test_an_index_survives_a_run_that_ends_early(tmp_path, monkeypatch):
    rows = crowd(3)
    config, index = DedupSettings(), tmp_path / "index"
    dedup([write(tmp_path / "0.parquet", rows[:90])], config, tmp_path / "work", index=index)
    second = write(tmp_path / "1.parquet", rows[90:])
    with monkeypatch.context() as patch:
        patch.setattr(Index, "commit", Mock(side_effect=OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            dedup([second], config, tmp_path / "work", index=index)
    result = dedup([second], config, tmp_path / "work", index=index)
    same_rows(result, dedup([write(tmp_path / "a.parquet", rows)], config, tmp_path / "full"))
    assert pq.read_table(result.signatures).num_rows == len(rows)


def test_a_first_run_that_ends_early_leaves_no_signatures_to_be_read(tmp_path, monkeypatch):
    file = write(tmp_path / "in.parquet", corpus())
    monkeypatch.setattr("pipelines.dedup.near_pairs", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        dedup([file], DedupSettings(), tmp_path / "work", index=tmp_path / "index")
    assert not (tmp_path / "index" / "signatures").exists()


def test_an_index_refuses_other_settings_and_known_answers(tmp_path):
    file = write(tmp_path / "in.parquet", corpus())
    dedup([file], DedupSettings(), tmp_path / "work", index=tmp_path / "index")
    with pytest.raises(BadInputError, match="remove the folder to make it anew"):
        dedup([], DedupSettings(threshold=0.7), tmp_path / "work", index=tmp_path / "index")
    with pytest.raises(BadInputError, match="trajectory ids come more than once"):
        dedup([file], DedupSettings(), tmp_path / "work", index=tmp_path / "index")


def test_which_answers_an_index_lacks(tmp_path):
    config, index = DedupSettings(), tmp_path / "index"
    said = {1: "a b c", 2: "d e f", 3: "g h i"}

    def present(*numbers, **other):
        texts = [other.get(f"of_{n}", said[n]) for n in numbers]
        return pa.table(
            {
                "trajectory_id": ids.array(map(number, numbers)),
                "content_hash": ids.array(ids.content_id("text", text) for text in texts),
            }
        )

    assert new_answers(index, config, present(1)) is None
    table = present(1, 2)
    table = table.append_column("prompt_id", table["trajectory_id"])
    table = table.append_column("source", pa.array(["s", "s"]))
    table = table.append_column("text", pa.array([said[1], said[2]]))
    pq.write_table(table, tmp_path / "in.parquet")
    dedup([tmp_path / "in.parquet"], config, tmp_path / "work", index=index)
    assert new_answers(index, config, present(2, 1)).tolist() == []
    assert new_answers(index, config, present(3, 1, 2)).tolist() == [0]
    assert new_answers(index, config, present(1, 3)) is None  # 2 is gone
    assert new_answers(index, config, present(1, 2, of_2="other")) is None
    assert new_answers(index, DedupSettings(words=4), present(1, 2)) is None


@pytest.mark.slow
def test_processes_side_by_side_change_nothing(tmp_path):
    rows = crowd(1)
    files = [write(tmp_path / f"{n}.parquet", rows[n::3], 20) for n in range(3)]
    expected = dedup(files, DedupSettings(), tmp_path / "a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.sketches.PART_ROWS", 20)
        result = dedup(files, DedupSettings(), tmp_path / "b", workers=2)
    same_rows(result, expected)
    assert pq.read_table(result.signatures).equals(pq.read_table(expected.signatures))


def test_books_balance_by_source(tmp_path):
    rows = corpus()
    result = dedup([write(tmp_path / "in.parquet", rows)], DedupSettings(), tmp_path)
    for source, total in Counter(source for _, _, source, _ in rows).items():
        book = books(result, source)
        assert book.pop("in") == total == sum(book.values())


def test_a_frequent_answer_in_many_spellings_stays_linear(tmp_path):
    rows = [(n + 1, 1, "s", LONG + " " * n) for n in range(600)]
    result = dedup([write(tmp_path / "in.parquet", rows)], DedupSettings(), tmp_path)
    assert clusters(result, "prompt") == {1: ("near", list(range(1, 601)))}


def test_nothing_in_nothing_out(tmp_path):
    result = dedup([write(tmp_path / "in.parquet", [])], DedupSettings(), tmp_path)
    assert result.duplicates.num_rows == result.counts.num_rows == 0
    assert pq.read_table(result.signatures).num_rows == 0


def test_only_empty_answers(tmp_path):
    rows = [(1, 1, "s", ""), (2, 1, "s", "")]
    result = dedup([write(tmp_path / "in.parquet", rows)], DedupSettings(), tmp_path)
    assert result.duplicates.num_rows == 0
    assert books(result, "s") == {"in": 2, "out": 0, "empty": 2, "exact": 0, "near": 0}


def test_signatures_file_holds_the_signatures_and_nothing_else_is_left(tmp_path):
    rows = corpus()
    steps = []
    result = dedup(
        [write(tmp_path / "in.parquet", rows)],
        DedupSettings(permutations=112),
        tmp_path / "work",
        lambda done, total, note: steps.append((done, total, note)),
    )
    made = matrix(pq.read_table(result.signatures)["signature"])
    expected = signatures(
        shingles(pa.array([row[3] for row in rows])), DedupSettings(permutations=112)
    )
    assert np.array_equal(made, expected)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["signatures.parquet"]
    assert steps[-1][:2] == (len(rows), len(rows))


def test_lost_rows_void_the_run(tmp_path, monkeypatch):
    whole = near.Entries.load

    def short(folder):
        e = whole(folder)
        return near.Entries(row=e.row[1:], text=e.text[1:], realm=e.realm[1:])

    monkeypatch.setattr(near.Entries, "load", short)
    with pytest.raises(CountMismatchError, match="rows were lost or doubled"):
        dedup([write(tmp_path / "in.parquet", corpus())], DedupSettings(), tmp_path / "work")
    assert not list((tmp_path / "work").glob("dedup-*"))


def test_bad_input_is_named(tmp_path):
    twice = write(tmp_path / "a.parquet", [(1, 1, "s", "x"), (1, 1, "s", "y")])
    with pytest.raises(BadInputError, match=r"1 trajectory ids come more than once, .*00000001;"):
        dedup([twice], DedupSettings(), tmp_path)
    null = write(tmp_path / "b.parquet", [(1, 1, "s", None)])
    with pytest.raises(BadInputError, match=r"b.parquet: column text holds nulls"):
        dedup([null], DedupSettings(), tmp_path)
    pq.write_table(pq.read_table(null).drop_columns(["source"]), tmp_path / "c.parquet")
    with pytest.raises(BadInputError, match=r"c.parquet: .* missing: \['source'\]"):
        dedup([tmp_path / "c.parquet"], DedupSettings(), tmp_path)
