"""The task of bench-real-pool: sides, draws and what may stand in a group."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.real_pool_task import CELLS, _near, draw, family, groups_table, held_out, read_pool
from trainer.data import GROUPS_SCHEMA

SAMPLE = Path(__file__).parents[3] / "shared/data/sample"
OPEN = SAMPLE.with_name("open")


@pytest.fixture(scope="module")
def pool():
    if not OPEN.is_dir():
        pytest.skip(f"{OPEN} is not there: recorded answers of many policies are needed")
    return read_pool(OPEN)


def test_near_texts_are_those_that_share_four_fifths_of_their_shingles():
    words = [f"w{i}" for i in range(60)]
    texts = [" ".join(words), " ".join([*words[:-1], "other"]), " ".join(words[::-1])]
    near = _near(np.array(["p", "p", "p"], object), pa.array(texts))
    assert near == {0: {1}, 1: {0}}
    assert _near(np.array(["p", "q", "q"], object), pa.array(texts)) == {}


def test_sides_are_a_function_of_names():
    assert held_out("bench-policy-1", "alpaca")
    assert not held_out("bench-policy-1", "gpt-4")
    assert family("oasst-sft-4-pythia-12b") == family("pythia-12b-pre-v8")


@pytest.mark.slow
def test_the_sides_are_the_issue_s(pool):
    policies, prompts = pool.sides()
    assert len(set(pool.policy_group[policies])) == 16
    assert len(set(pool.policy_group)) == 72
    assert len(set(pool.prompt_group[prompts])) == 51
    assert len(set(pool.prompt_group)) == 307


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_groups_keep_the_rules(pool, cell):
    drawn = draw(pool, cell, 300, negatives=3, seed=5)
    assert drawn == draw(pool, cell, 300, negatives=3, seed=5)
    policies, prompts = pool.sides()
    wanted = CELLS[cell]
    usable = Counter(zip(pool.prompt, pool.policy, strict=True))
    for answers in drawn:
        reference, positive, *negatives = answers
        assert len({pool.prompt[row] for row in answers}) == 1
        assert pool.policy[reference] == pool.policy[positive]
        groups = [pool.policy_group[row] for row in (positive, *negatives)]
        assert len(set(groups)) == 4
        assert all((policies[row], prompts[row]) == wanted for row in answers)
        assert all(len(pool.text[row].strip()) > 20 for row in answers)
        assert all(usable[pool.prompt[row], pool.policy[row]] >= 2 for row in answers)
        assert not any(b in pool.near.get(a, ()) for a in answers for b in answers)
    table = groups_table(pool, drawn, cell, "eval")
    assert table.schema == GROUPS_SCHEMA
    assert {c["rank"] for c in table.column("candidates")[0].as_py()} == {0, 1}


@pytest.mark.slow
def test_policies_are_positive_as_often_as_negative(pool):
    drawn = draw(pool, "new_policy", 4000, negatives=3, seed=9)
    positive = Counter(pool.policy[answers[1]] for answers in drawn)
    negative = Counter(pool.policy[row] for answers in drawn for row in answers[2:])
    for policy, times in positive.items():
        expected = negative[policy] / 3
        assert abs(times - expected) < 5 * np.sqrt(times + expected) + 1
