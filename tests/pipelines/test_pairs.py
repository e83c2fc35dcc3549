"""Pairs end to end: keys, books, budget, and the same table whatever the chunks."""

from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import ids, schemas
from pipelines.budget import Budget, draw_rates
from pipelines.chunks import split_chunks
from pipelines.errors import BadInputError
from pipelines.labels import read_answers
from pipelines.pairs import (
    PairSettings,
    count_pairs,
    drop,
    judge,
    make_pairs,
    pairs_table,
    similarity,
    tally,
)
from pipelines.pairs_balance import balance, label_shares, merge_sums, pair_rulers, sum_pairs
from tests.pipelines.answers import Answer, answers_table, worlds


def in_process(table, config):
    """Pairs and counts of a table as one chunk, without Beam."""
    x = read_answers(table)
    judged = judge(x, config)
    rates = draw_rates(tally(x, judged), config.budget) if config.budget else None
    gone = drop(x, judged, rates, config)
    kept = np.flatnonzero(gone == 0)
    alike = similarity(x, judged.a[kept], judged.b[kept])
    pairs = pairs_table(x, judged, kept, alike).cast(schemas.PAIRS.schema)
    return pairs, count_pairs(x, judged, gone)


def big_world(prompts=12, policies=9, samples=4):
    """Policies in runs of three checkpoints, a third of them on the test side."""
    return [
        Answer(
            prompt=f"p{p}",
            policy=f"q{q}",
            sample=s,
            text="x" * (5 + (7 * p + 3 * q + s) % 40) + f"{p} {q} {s}",
            group=f"run{q // 3}",
            step=q % 3,
            policy_side="test" if q >= 6 else "train",
            prompt_side="test" if p % 4 == 0 else "train",
            source=f"source{p % 2}",
        )
        for p in range(prompts)
        for q in range(policies)
        for s in range(samples)
    ]


@given(worlds(), st.booleans(), st.sampled_from([None, Budget(), Budget(pairs_per_prompt=2)]))
@settings(max_examples=60, deadline=None)
def test_keys_are_unique_ordered_and_within_one_prompt_and_the_books_balance(
    answers, require, budget
):
    config = PairSettings(require_same_sampling=require, budget=budget)
    table, counts = in_process(answers_table(answers), config)
    assert table.schema.equals(schemas.PAIRS.schema)
    prompt_of = {r.id: r.prompt_id for r in answers}
    keys = [
        (r["trajectory_a"].bytes, r["trajectory_b"].bytes, r["prompt_id"].bytes)
        for r in table.to_pylist()
    ]
    assert len(set(keys)) == len(keys)
    assert all(a < b and prompt_of[a] == prompt_of[b] == p for a, b, p in keys)
    by_what = dict.fromkeys(("in", "out", "excluded"), 0)
    for (_, what, *_), rows in counts.items():
        by_what[what] += rows
    same_prompt = sum(x.prompt_id == y.prompt_id for x, y in combinations(answers, 2))
    assert by_what["in"] == same_prompt == by_what["out"] + by_what["excluded"]
    assert by_what["out"] == len(keys)
    if budget is None:
        assert not any("budget" in key[3] for key in counts)
    if budget and budget.pairs_per_prompt:
        assert all(
            count <= 2
            for count in pc.value_counts(ids.storage(table["prompt_id"])).field(1).to_pylist()
        )


@given(worlds(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_pairs_do_not_depend_on_the_order_of_rows(answers, random):
    table = answers_table(answers)
    order = list(range(len(answers)))
    random.shuffle(order)
    shuffled = table.take(pa.array(order, pa.int64()))
    assert in_process(shuffled, PairSettings())[0].equals(in_process(table, PairSettings())[0])


def test_nothing_crosses_sides():
    table, counts = in_process(answers_table(big_world()), PairSettings())
    side = {r.id: (r.prompt_side, r.policy_side) for r in big_world()}
    for row in table.to_pylist():
        a, b = side[row["trajectory_a"].bytes], side[row["trajectory_b"].bytes]
        assert a == b
        assert row["cell"] == schemas.cell_of(*a)
        assert row["split"] == ("train" if a == ("train", "train") else "eval")
    mixed = sum(rows for key, rows in counts.items() if key[3] == "mixed_sides")
    assert mixed == 12 * (6 * 4) * (3 * 4)


def test_similarity_and_length_ratio_are_those_of_the_two_answers():
    answers = [Answer(prompt="p", policy=f"q{i}", text="word " * (i + 1)) for i in range(4)]
    source = answers_table(answers)
    signature = {row["trajectory_id"]: np.array(row["signature"]) for row in source.to_pylist()}
    length = {row["trajectory_id"]: row["length"] for row in source.to_pylist()}
    table, _ = in_process(source, PairSettings(budget=None))
    assert table.num_rows == 6
    for row in table.to_pylist():
        a, b = row["trajectory_a"], row["trajectory_b"]
        assert row["similarity"] == pytest.approx((signature[a] == signature[b]).mean())
        lengths = sorted((length[a], length[b]))
        assert row["length_ratio"] == pytest.approx(lengths[0] / lengths[1])


def test_beam_gives_the_same_pairs_whatever_the_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.pairs_balance.AT_ONCE", 5)  # 12 chunks are added in steps
    source = tmp_path / "answers.parquet"
    table = answers_table(big_world())
    pq.write_table(table, source)
    expected, _ = in_process(table, PairSettings())
    seen = []
    results = [
        make_pairs(
            source,
            PairSettings(),
            tmp_path / str(size),
            chunk_pairs=size,
            progress=lambda *step: seen.append(step),
        )
        for size in (1, 3000, 10**9)
    ]
    for result in results:
        assert pq.read_table(result.files, schema=schemas.PAIRS.schema).equals(expected)
        assert result.counts.equals(results[0].counts)
        assert result.sums.equals(results[0].sums)
        assert result.rows == expected.num_rows
    assert len(results[0].files) == 12
    assert seen[-1][0] == seen[-1][1] == 2
    assert results[0].counts.schema.equals(schemas.COUNTS.schema)
    assert results[0].sums.schema.equals(schemas.PAIR_SUMS.schema)
    shares = {(r["source"], r["split"]): r for r in label_shares(results[0].counts).to_pylist()}
    for split in ("train", "eval", *schemas.CELLS):
        assert shares["all", split]["possible"]
        assert 0.05 <= shares["all", split]["share"] <= 0.6


@pytest.mark.slow
def test_two_processes_make_the_files_of_one(tmp_path):
    source = tmp_path / "answers.parquet"
    pq.write_table(answers_table(big_world()), source)
    one, two = (
        make_pairs(source, PairSettings(), tmp_path / str(n), chunk_pairs=3000, workers=n)
        for n in (1, 2)
    )
    assert [file.name for file in one.files] == [file.name for file in two.files]
    pairs = zip(one.files, two.files, strict=True)
    assert all(first.read_bytes() == second.read_bytes() for first, second in pairs)
    assert one.sums.equals(two.sums)
    assert one.counts.equals(two.counts)


def test_an_empty_input_gives_no_pairs(tmp_path):
    source = tmp_path / "answers.parquet"
    pq.write_table(answers_table([]), source)
    result = make_pairs(source, PairSettings(), tmp_path / "work")
    assert (result.files, result.rows, result.counts.num_rows) == ([], 0, 0)


def test_a_source_with_single_samples_is_reported_as_impossible():
    answers = [
        Answer(prompt=f"p{p}", policy=f"q{q}", source=source, sample=s)
        for source, samples in (("single", 1), ("many", 3))
        for p in range(5)
        for q in range(6)
        for s in range(samples)
    ]
    _, counts = in_process(answers_table(answers), PairSettings())
    names = ("source", "stage", "what", "label", "reason", "split", "rows")
    rows = [
        dict(zip(names, (key[0], "pairs", *key[1:], n), strict=True)) for key, n in counts.items()
    ]
    shares = label_shares(pa.Table.from_pylist(rows, schema=schemas.COUNTS.schema)).to_pylist()
    found = {(r["source"], r["split"]): (r["possible"], r["same"] > 0) for r in shares}
    assert found["single", "seen"] == (False, False)
    assert found["many", "seen"] == (True, True)
    assert 0.05 <= next(r["share"] for r in shares if r["split"] == "train") <= 0.6


def test_the_cap_on_same_policy_pairs_is_by_prompt_and_policy():
    answers = [
        Answer(prompt=f"p{p}", policy=q, sample=s)
        for p in range(2)
        for q in ("A", "B")
        for s in range(6)
    ]
    config = PairSettings(budget=Budget(same_per_policy=4, same_policy_share=0.5))
    table, counts = in_process(answers_table(answers), config)
    assert table.filter(pc.field("label") == "same_policy").num_rows == 2 * 2 * 4
    assert counts["made", "excluded", "same_policy", "budget", "seen"] == 2 * 2 * 11


def test_the_draws_of_what_a_cap_leaves_are_uniform():
    answers = [Answer(prompt=f"p{p}", policy="A", sample=s) for p in range(40) for s in range(12)]
    config = PairSettings(budget=Budget(same_per_policy=10))
    judged = judge(read_answers(answers_table(answers)), config)
    left = judged.draw[judged.gone == 0]
    assert len(left) == 40 * 10
    counted = np.histogram(left, bins=4, range=(0, 1))[0]
    assert counted.min() > 70  # the ten smallest of 66 would all be below a quarter


def test_rulers_see_what_a_length_gives_away():
    values = pa.Table.from_pylist(
        [
            {"split": "train", "ruler": ruler, "value": value, "same": same, "other": other}
            for ruler, value, same, other in (
                ("length_ratio", 1.0, 10, 0),
                ("length_ratio", 0.5, 0, 10),
                ("similarity", 0.3, 10, 10),
            )
        ]
    )
    auc = {(r["split"], r["ruler"]): (r["auc"], r["n"]) for r in pair_rulers(values).to_pylist()}
    assert auc["train", "length_ratio"] == (1.0, 20)
    assert auc["train", "similarity"] == (0.5, 20)
    assert auc["eval", "similarity"] == (None, 0)


def test_the_cap_on_cross_policy_pairs_is_by_prompt_and_two_policies():
    answers = [
        Answer(prompt=f"p{p}", policy=q, sample=s)
        for p in range(2)
        for q in ("A", "B", "C")
        for s in range(4)
    ]
    budget = Budget(cross_per_policies=5, same_policy_share=0.5, length_matched=False)
    table, counts = in_process(answers_table(answers), PairSettings(budget=budget))
    policy_of = {r.id: (r.prompt, r.policy) for r in answers}
    cross = Counter(
        (policy_of[row["trajectory_a"].bytes][0],)
        + tuple(sorted(policy_of[row[of].bytes][1] for of in ("trajectory_a", "trajectory_b")))
        for row in table.filter(pc.field("label") == "cross_policy").to_pylist()
    )
    assert len(cross) == 2 * 3
    assert max(cross.values()) == 5
    assert counts["made", "excluded", "cross_policy", "budget", "seen"] >= 2 * 3 * 11


@pytest.mark.parametrize("limits", [{}, {"cross_per_policies": 14}, {"pairs_per_prompt": 60}])
def test_limits_leave_the_shares_as_they_were_asked_for(limits):
    budget = Budget(same_policy_share=0.2, length_matched=False, **limits)
    table, _ = in_process(answers_table(big_world(prompts=60)), PairSettings(budget=budget))
    seen = table.filter((pc.field("cell") == "seen") & (pc.field("label") != "ambiguous"))
    same = pc.sum(pc.equal(seen["label"], "same_policy")).as_py() / len(seen)
    sibling = pc.sum(pc.equal(seen["relation"], "sibling")).as_py() / len(seen) / (1 - same)
    assert same == pytest.approx(0.2, abs=0.02)
    assert sibling == pytest.approx(0.2, abs=0.04)


@given(worlds())
@settings(max_examples=30, deadline=None)
def test_sums_are_those_of_the_pairs(tmp_path_factory, answers):
    x = read_answers(answers_table(answers))
    judged = judge(x, PairSettings(budget=None))
    kept = np.flatnonzero(judged.gone == 0)
    alike = similarity(x, judged.a[kept], judged.b[kept])
    file = tmp_path_factory.mktemp("sums") / "sums.arrow"
    feather.write_feather(sum_pairs(x, judged, kept, alike), file)
    policy_of = {r.id: r.policy_id for r in answers}
    source_of = {r.id: r.source for r in answers}
    expected = defaultdict(list)
    for row in pairs_table(x, judged, kept, alike).to_pylist():
        a, b = row["trajectory_a"].bytes, row["trajectory_b"].bytes
        policies = sorted((policy_of[a], policy_of[b]))
        kind = (row["cell"], row["label"], row["reason"] or "", row["relation"])
        expected[source_of[a], *policies, *kind].append((row["similarity"], row["length_ratio"]))
    found = merge_sums([file]).to_pylist()
    assert len(found) == len(expected)
    for row in found:
        kind = (row["cell"], row["label"], row["reason"], row["relation"])
        values = expected[row["source"], row["policy_a"].bytes, row["policy_b"].bytes, *kind]
        assert row["pairs"] == len(values)
        means = (row["mean_similarity"], row["mean_length_ratio"])
        assert means == pytest.approx(np.mean(values, axis=0), abs=1e-6)
        assert row["split"] == ("train" if row["cell"] == "seen" else "eval")


def test_compiled_and_plain_similarity_have_the_same_bits(monkeypatch):
    x = read_answers(answers_table(big_world(prompts=2), permutations=7))
    a, b = judge(x, PairSettings(budget=None)).a, judge(x, PairSettings(budget=None)).b
    fast = similarity(x, a, b)
    monkeypatch.setattr("pipelines.minhash.compiled", lambda: None)
    assert similarity(x, a, b, block=1000).tobytes() == fast.tobytes()


def test_the_balance_says_what_the_budget_gave(tmp_path):
    source = tmp_path / "answers.parquet"
    pq.write_table(answers_table(big_world(prompts=40)), source)
    apart = {}
    for matched in (True, False):
        budget = Budget(same_policy_share=0.2, sibling_share=0.3, length_matched=matched)
        result = make_pairs(source, PairSettings(budget=budget), tmp_path / str(matched))
        rows = balance(result.sums).to_pylist()
        assert sum(row["pairs"] for row in rows) == result.rows
        for row in rows:
            assert row["couple_most"] >= row["couple_median"] > 0
            if row["cell"] == "seen":
                assert row["same_policy"] == pytest.approx(0.2, abs=0.03)
                assert row["sibling"] == pytest.approx(0.3, abs=0.05)
                gap = abs(row["length_ratio_same"] - row["length_ratio_cross"])
                apart[row["source"], matched] = gap
    assert len(apart) == 4
    assert all(gap < apart[source, False] for (source, matched), gap in apart.items() if matched)


def test_chunks_hold_whole_prompts_and_refuse_unsorted_input(tmp_path):
    table = answers_table(big_world())
    source = tmp_path / "answers.parquet"
    pq.write_table(table, source, row_group_size=50)
    chunks = [feather.read_table(f) for f in split_chunks(source, tmp_path / "chunks", 2500)]
    assert len(chunks) > 1
    assert pa.concat_tables(chunks).equals(table)
    prompts = [set(chunk["prompt_id"].to_pylist()) for chunk in chunks]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    pq.write_table(table.take(pa.array([0, 100, 1])), source)
    with pytest.raises(BadInputError, match="not sorted by prompt_id"):
        split_chunks(source, tmp_path / "other")
