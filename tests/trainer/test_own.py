"""Fine-tuning on one's own ranked answers: settings that fit, scores before and after."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.test_loop import run
from trainer.errors import BadGroupsError
from trainer.own import Change, finetune_own, fitting
from trainer.score import Scorer


@given(st.integers(1, 300_000), st.sampled_from([64, 128, 768, 2048, 4096]))
def test_settings_fit_from_one_row_to_the_papers_many(groups, width):
    settings = fitting(groups, width)
    steps = settings.epochs * -(-groups // settings.batch_groups)
    assert 4 <= settings.batch_groups <= 320
    assert 1 <= settings.epochs <= 10
    assert steps >= 50 or settings.epochs == 10
    assert settings.lr == pytest.approx(1e-5 * 2048 / width)


def test_settings_at_the_ends():
    few, many = fitting(20, 128), fitting(150_000, 2048)
    assert (few.batch_groups, few.epochs) == (4, 10)
    assert (many.batch_groups, many.epochs, many.lr) == (320, 1, 1e-5)


def test_a_change_is_summed_up_and_ties_count_one_half():
    change = Change(
        ranks=[np.array([0, 1]), np.array([2, 0, 1])],
        before=[np.array([1.0, 1.0]), np.array([0.0, 1.0, 2.0])],
        after=[np.array([3.0, 1.0]), np.array([0.0, 3.0, 1.0])],
    )
    assert change.summary() == {
        "comparisons": 4,
        "before": {"accuracy": 2.5 / 4, "margin": (0 + 1 - 1 + 2) / 4},
        "after": {"accuracy": 1.0, "margin": (2 + 3 + 2 + 1) / 4},
    }
    assert change.rows()[1] == {
        "before_chosen": 1.0,
        "before_rejected": 0.0,
        "after_chosen": 3.0,
        "after_rejected": 0.0,
    }


@pytest.fixture(scope="module")
def start(tmp_path_factory, groups_file, backbone):
    out = tmp_path_factory.mktemp("own") / "start"
    run(groups_file, backbone, out, max_steps=3)
    return out


@pytest.fixture
def mine(tmp_path):
    """Twenty rows in the official format."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
            "reference": [{"role": "assistant", "content": f"It is {i + 1}."}],
            "chosen": [{"role": "assistant", "content": f"{i + 1}."}],
            "rejected": [{"role": "assistant", "content": "WHO KNOWS? NOT ME!"}],
        }
        for i in range(20)
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_twenty_rows_are_learned_and_scored_before_and_after(start, mine, tmp_path):
    out = tmp_path / "out"
    summary, change = finetune_own(start, mine, out, words=["lr=0.005", "epochs=4"])
    assert (summary["steps"], summary["groups"]) == (20, 20)
    found = change.summary()
    assert found["after"]["accuracy"] == 1.0
    assert found["after"]["margin"] > found["before"]["margin"] + 1
    first = json.loads(mine.read_text().splitlines()[0])
    item = {"prompt": first["prompt"], "reference": first["reference"], "output": first["chosen"]}
    row = change.rows()[0]
    for folder, name in ((start, "before_chosen"), (out, "after_chosen")):
        scored = Scorer.load(folder).score([item | {"wrapper": "sft"}])
        assert row[name] == pytest.approx(float(scored[0]), abs=1e-4)
    again, same = finetune_own(start, mine, out, words=["lr=0.005", "epochs=4"])
    assert again["curve"] == summary["curve"]
    assert same.summary() == found


def test_a_bad_line_is_named_before_anything_is_written(start, mine, tmp_path):
    lines = mine.read_text().splitlines()
    lines[6] = lines[6][:-10]
    mine.write_text("\n".join(lines))
    with pytest.raises(BadGroupsError, match=r"mine.jsonl: line 7: not UTF-8 JSON"):
        finetune_own(start, mine, tmp_path / "out")
    mine.write_text(lines[0] + '\n{"prompt": "a", "reference": "b", "chosen": "c"}\n')
    with pytest.raises(BadGroupsError, match="line 2: field 'rejected' is missing"):
        finetune_own(start, mine, tmp_path / "out")
    mine.write_text("\n")
    with pytest.raises(BadGroupsError, match="no rows of split 'train'"):
        finetune_own(start, mine, tmp_path / "out")
    assert not (tmp_path / "out").exists()
