"""Pairs end to end: keys, books, budget, and the same table whatever the chunks."""

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
    label_shares,
    make_pairs,
    pair_rulers,
    pairs_table,
    tally,
)
from tests.pipelines.answers import Answer, answers_table, worlds


def in_process(table, config):
    """Pairs and counts of a table as one chunk, without Beam."""
    x = read_answers(table)
    judged = judge(x, config)
    rates = draw_rates(tally(x, judged), config.budget) if config.budget else None
    gone = drop(x, judged, rates, config)
    return pairs_table(x, judged, gone == 0), count_pairs(x, judged, gone)


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


def test_beam_gives_the_same_pairs_whatever_the_chunks(tmp_path):
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
        assert result.rows == expected.num_rows
    assert len(results[0].files) == 12
    assert seen[-1][0] == seen[-1][1] == 2
    assert results[0].counts.schema.equals(schemas.COUNTS.schema)
    shares = {(r["source"], r["split"]): r for r in label_shares(results[0].counts).to_pylist()}
    for split in ("train", "eval", *schemas.CELLS):
        assert shares["all", split]["possible"]
        assert 0.05 <= shares["all", split]["share"] <= 0.6


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


def test_rulers_see_what_a_length_gives_away():
    label = pa.array(["same_policy", "cross_policy"] * 10)
    pairs = pa.table(
        {
            "split": ["train"] * 20,
            "label": label,
            "length_ratio": pa.array([1.0, 0.5] * 10),
            "similarity": pa.array([0.3, 0.3] * 10),
        }
    )
    auc = {(r["split"], r["ruler"]): r["auc"] for r in pair_rulers(pairs).to_pylist()}
    assert auc["train", "length_ratio"] == 1.0
    assert auc["train", "similarity"] == 0.5
    assert auc["eval", "similarity"] is None


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
