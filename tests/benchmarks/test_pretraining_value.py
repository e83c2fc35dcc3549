"""The judgements of bench-pretraining-value, and the mean that its table shows."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assets.home import PROJECT
from benchmarks import pretraining_value as bench
from benchmarks.pretraining_value_arms import preferred
from benchmarks.pretraining_value_items import groups_of, ranked, read_judgements
from benchmarks.pretraining_value_report import write_value_report
from trainer.comparisons import compare, read_rows


def preference(prompt: str, a: str, b: str, verdict: str) -> dict:
    return {
        "prompt_id": prompt,
        "source": prompt.split("/")[0],
        "prompt": f"the text of {prompt}",
        "response_a": a,
        "response_b": b,
        "preference": verdict,
    }


@pytest.fixture
def data(tmp_path) -> Path:
    prompts = [("s/1", None), ("s/2", "gold"), ("s/3", None), ("t/1", "x")]
    rows = [
        preference("s/1", "one", "two", "a"),
        preference("s/1", "three", "two", "b"),
        preference("s/1", "one", "three", "a"),
        preference("s/2", "good", "bad", "a"),
        preference("s/2", "bad", "good", "b"),
        preference("s/2", "bad", "good", "a"),
        preference("s/2", "same", "same", "a"),
        preference("s/3", "p", "q", "a"),
        preference("s/3", "q", "p", "a"),
        preference("s/3", "p", "r", "tie"),
        preference("t/1", "x", "y", "a"),
    ]
    triple = {"prompt_id": "s/1", "response_1": "one", "response_2": "two", "response_3": "three"}
    pq.write_table(
        pa.Table.from_pylist(
            [{"prompt_id": p, "prompt_group": f"group {p}", "reference": r} for p, r in prompts]
        ),
        tmp_path / "prompts.parquet",
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "preferences.parquet")
    pq.write_table(pa.Table.from_pylist([triple]), tmp_path / "ranked_triples.parquet")
    return tmp_path


def test_references_come_from_triples_then_prompts_then_the_best_other_answer(data):
    judgements, counts = read_judgements(data)
    found = {(j.chosen, j.rejected): (j.reference, j.origin) for j in judgements}
    assert found == {
        ("two", "three"): ("one", "triple"),
        ("one", "two"): (None, "none"),  # the third answer was beaten
        ("one", "three"): (None, "none"),
        ("good", "bad"): ("gold", "prompt"),  # two votes against one
        ("x", "y"): (None, "none"),  # an answer is not its own reference
    }
    assert counts["read"] == 11
    assert counts["equal answers"] == 1
    assert counts["undecided"] == 2  # one vote each, and a tie


def test_without_a_reference_its_place_is_empty(data):
    judgements, _ = read_judgements(data)
    own = [j for j in judgements if j.reference is not None]
    for reference in (True, False):
        table = groups_of([[j] for j in own], reference=reference, split="train")
        texts = table.column("reference").to_pylist()
        assert texts == ([j.reference for j in own] if reference else [""] * len(own))


def judged(*pairs: str) -> list[bench.Judgement]:
    shared = {"source": "s", "prompt": "p", "prompt_group": "p", "origin": "prompt"}
    return [
        bench.Judgement(chosen=one, rejected=other, reference="r", **shared) for one, other in pairs
    ]


@pytest.mark.parametrize(
    ("pairs", "sizes"),
    [
        (["ab", "bc", "ac"], [3]),  # a before b before c
        (["ab", "ac"], [2]),  # of b and c nothing is said
        (["ac", "bc"], [2]),
        (["ab", "cd"], [1, 1]),  # nothing joins them
        (["ab", "cd", "ad", "cb"], [4]),
        (["ab", "cd", "ad"], [1, 1, 1]),  # a ranking would say that c is better than b
        (["ab", "bc"], [1, 1]),  # nobody said that a is better than c
        (["ab", "bc", "ca"], [1, 1, 1]),
        (["ab", "ac", "ac"], [1, 1, 1]),  # as many as a ranking says, and others
    ],
)
def test_judgements_are_one_group_where_a_ranking_says_them_and_no_more(pairs, sizes):
    judgements = judged(*pairs)
    parts = ranked(judgements)
    assert sorted(map(len, parts)) == sizes
    comparisons = compare(read_rows(groups_of(parts, reference=True, split="train")))
    said = [
        comparisons.items[one]["output"] + comparisons.items[other]["output"]
        for one, other in zip(comparisons.winner, comparisons.loser, strict=True)
    ]
    assert sorted(said) == sorted(pairs)


def test_answers_beside_another_reference_are_not_joined():
    one, other = judged("ab", "ac")
    assert len(ranked([one, replace(other, reference="another")])) == 2
    assert len(ranked([one, replace(other, prompt="another")])) == 2


def test_an_answer_is_scored_once_and_every_judgement_has_its_outcome():
    seen = []

    class Lengths:
        def score(self, items, batch_tokens):
            seen.extend(items)
            return np.array([len(item["output"]) for item in items], np.float32)

    judgements = judged(("aa", "b"), ("b", "aa"), ("b", "c"))
    assert preferred(Lengths(), judgements, reference=True).tolist() == [1.0, 0.0, 0.5]
    assert [item["output"] for item in seen] == ["aa", "b", "c"]
    assert {item["reference"] for item in seen} == {"r"}
    preferred(Lengths(), judgements, reference=False)
    assert seen[-1]["reference"] == ""


def many(sources: dict[str, int]) -> list[bench.Judgement]:
    return [
        bench.Judgement(
            source=source,
            prompt=f"{source} {i}",
            prompt_group=f"{source} {i // 2}",
            chosen="a",
            rejected="b",
            reference="r" if i % 3 else None,
            origin="prompt",
        )
        for source, n in sources.items()
        for i in range(n)
    ]


def test_no_prompt_group_is_learned_from_and_measured():
    judgements = many({"s": 200, "t": 40})
    for fold in range(5):
        part = bench.Part(50, 0, fold)
        learned = bench.lesson(judgements, part)
        own = bench.measured(judgements, fold, reference=False)
        assert len(learned) == 50
        assert not {j.prompt_group for j in learned} & {j.prompt_group for j in own}
        assert all(j.reference for j in bench.measured(judgements, fold, reference=True))
    assert sum(len(bench.measured(judgements, f, reference=False)) for f in range(5)) == 240


def test_a_large_source_does_not_outweigh_a_small_one_and_a_tiny_one_does_not_count():
    judgements = many({"large": 300, "small": 30, "tiny": 5})
    values = np.array([{"large": 1.0, "small": 0.0, "tiny": 1.0}[j.source] for j in judgements])
    found = bench._macro(judgements, {"x": values}, "x", None)
    assert found["value"] == 0.5
    assert found["low"] <= 0.5 <= found["high"]
    assert set(found["sources"]) == {"large", "small"}


def test_the_table_shows_only_what_is_there_whole(tmp_path):
    judgements = many({"s": 800})
    rates = dict.fromkeys(itertools.product(bench.ARMS, bench.TRIALS.values()), 1e-4)
    assert bench.results(judgements, tmp_path, rates) == []
    for seed in bench.SEEDS:
        for fold in range(5):
            for arm in bench.ARMS:
                own = bench.measured(judgements, fold, reference=arm != bench.BLIND)
                value = {bench.FULL: 1.0, bench.PLAIN: float(seed == 0), bench.BLIND: 0.5}[arm]
                file = bench.kept(tmp_path, bench.Part(50, seed, fold), arm, rates)
                np.savez(file, **{arm: np.full(len(own), value)})
    rows = bench.results(judgements, tmp_path, rates)
    assert bench.results(judgements, tmp_path, dict.fromkeys(rates, 1e-5)) == []
    seen = {(row["scorer"], row["on"]): row["value"] for row in rows}
    assert seen == {
        (bench.FULL, "with a reference"): 1.0,
        (bench.PLAIN, "with a reference"): pytest.approx(1 / 3, abs=1e-4),
        (bench.BLIND, "with a reference"): 0.5,
        (bench.BLIND, "without a reference"): 0.5,
    }
    assert rows[0]["lead"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    pages = {kind: path.read_text() for kind, path in write_value_report(tmp_path, rows).items()}
    for kind in ("md", "html"):
        assert "Pre-training at 50: +66.7 points" in pages[kind]
        assert "POLAR-7B" in pages[kind]
    assert f"| {bench.PLAIN} | 33.3 [33.3, 33.3] | " in pages["md"]
    assert json.loads(pages["json"])["rows"][0]["scorer"] == bench.FULL


def test_what_a_rate_was_chosen_on_is_no_result(tmp_path):
    judgements = many({"s": 2000})
    rates = dict.fromkeys(itertools.product(bench.ARMS, bench.TRIALS.values()), 1e-4)
    tuned = set(bench.chosen_on(judgements))
    assert len(tuned) == bench.TRIED
    for seed, fold in itertools.product(bench.SEEDS, range(5)):
        own = bench.measured(judgements, fold, reference=True)
        right = np.array([j not in tuned for j in own], float)
        part = bench.Part(None, seed, fold)
        np.savez(bench.kept(tmp_path, part, bench.FULL, rates), **{bench.FULL: right})
    (row,) = bench.results(judgements, tmp_path, rates)
    assert row["value"] == 1.0
    assert row["n"] == sum(j.reference is not None for j in judgements) - bench.TRIED


def test_too_few_judgements_to_choose_a_rate_are_refused():
    with pytest.raises(SystemExit, match="500 to choose rates on and 200 to learn from"):
        bench.trial_lesson(many({"s": 600}), bench.Part(200, 0, 0))


def test_a_part_without_a_lesson_has_no_rate(tmp_path, monkeypatch):
    judgements = many({"s": 50})
    monkeypatch.setattr(bench, "fine_tuned", lambda *given: np.ones(len(given[4])))
    monkeypatch.setattr(bench, "read_judgements", lambda _: (judgements, {}))
    part, given = bench.Part(0, 0, 0), argparse.Namespace(data=None)
    assert bench.run(part, bench.FULL, rates={}, folder=tmp_path, given=given) == (part, bench.FULL)
    assert bench.kept(tmp_path, part, bench.FULL, {}).is_file()


def test_the_rate_that_did_best_in_all_lessons_is_taken_and_not_tried_again(tmp_path, monkeypatch):
    judgements, seen = many({"s": 1000, "t": 1000}), []

    def fine_tuned(part, arm, rate, learned, held_out, folder, given):
        assert len(learned) == part.size
        assert held_out == bench.chosen_on(judgements)
        assert not {j.prompt_group for j in learned} & {j.prompt_group for j in held_out}
        seen.append((rate, part.seed))
        lucky = rate == 1e-5 and part.seed == 0  # in one lesson of three
        return np.full(len(held_out), 0.9 if lucky else 0.8 if rate == 5e-4 else 0.7)

    monkeypatch.setattr(bench, "fine_tuned", fine_tuned)
    monkeypatch.setattr(bench, "read_judgements", lambda _: (judgements, {}))
    given = argparse.Namespace(data=None)
    for _ in range(2):
        for trial in (50, 200):
            found = bench.rate_of(bench.PLAIN, trial, folder=tmp_path, given=given)
            assert found == ((bench.PLAIN, trial), 5e-4)
    assert seen == 2 * list(itertools.product(bench.RATES, bench.SEEDS))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_goes_on_where_it_was_stopped_with_every_scorer_once(tmp_path):
    from tests.trainer.conftest import byte_level_tokenizer, tiny_llama
    from trainer.model import RewardModel

    tokenizer = byte_level_tokenizer()
    network = tiny_llama(len(tokenizer), tie_word_embeddings=True, max_position_embeddings=512)
    network.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    RewardModel.start(tmp_path / "start", wrapper="sft").save(tmp_path / "pretrained")
    prompts, rows = [], []
    for i in range(1200):
        name = f"s/{i}"
        gold = "gold" if i % 9 else None
        prompts.append({"prompt_id": name, "prompt_group": name, "reference": gold})
        rows.append(preference(name, f"answer {i}", "no", "a"))
    pq.write_table(pa.Table.from_pylist(prompts), tmp_path / "prompts.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "preferences.parquet")
    triples = {"prompt_id": [], "response_1": [], "response_2": [], "response_3": []}
    pq.write_table(pa.table(triples), tmp_path / "ranked_triples.parquet")

    command = [sys.executable, "-m", "benchmarks.pretraining_value", "--data", str(tmp_path)]
    command += ["--pretrained", str(tmp_path / "pretrained"), "--start", str(tmp_path / "start")]
    command += ["--processes", "2", "--minutes", "0.01"]
    own = {"POLAR_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    seen: dict[str, int] = {}
    for times in range(1, 12):
        ended = subprocess.run(
            command, cwd=PROJECT, env=os.environ | own, capture_output=True, text=True, check=True
        )
        folder = Path(json.loads(ended.stdout.splitlines()[-1])["folder"])
        found = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
        assert seen.items() <= found.items(), "an outcome was made again"
        assert len(found) > len(seen)
        assert "the same command goes on" in ended.stderr
        assert times == 1 or "rate " not in ended.stderr, "a rate was tried again"
        seen = found
        if len(seen) >= 10:
            break
    judgements, _ = read_judgements(tmp_path)
    chosen = json.loads(ended.stdout.splitlines()[-1])["rates"]
    rates = {(arm, int(trial)): r for arm, each in chosen.items() for trial, r in each.items()}
    done = [each for each in bench.all_work() if bench.kept(folder, *each, rates).is_file()]
    assert len(done) == len(seen)
    for part, scorer in done:
        held_out = bench.measured(judgements, part.fold, reference=scorer != bench.BLIND)
        with np.load(bench.kept(folder, part, scorer, rates)) as outcomes:
            assert {len(outcomes[name]) for name in outcomes} == {len(held_out)}
    assert not list(folder.glob("unfinished-*"))
