"""Guided training reads what is measured, goes on where it was stopped, and leaves a checkpoint."""

from __future__ import annotations

import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from tests.trainer.conftest import handled, make_groups
from trainer import guided, resume
from trainer.errors import BadGroupsError, DivergedError, ResumeError
from trainer.guided import Guide, GuidedSettings, train_guided
from trainer.model import RewardModel
from trainer.packing import tokenise
from trainer.score import Scorer

FAST = GuidedSettings(lr=2e-3, batch_groups=8, precision="fp32", log_every=1)


@pytest.fixture(scope="module")
def lesson(tmp_path_factory, backbone):
    """Ids of 80 groups, and how long a candidate is beside its reference."""
    file = tmp_path_factory.mktemp("lesson") / "groups.parquet"
    table = make_groups(100)
    pq.write_table(table, file)
    ids, _ = tokenise([file], RewardModel.start(backbone, wrapper="pretrain").template)
    rows = {row["group_id"]: row for row in table.to_pylist()}
    pairs = [
        (len(rows[name]["reference"]), len(candidate["text"]), candidate["policy_id"])
        for name in ids.group_ids
        for candidate in rows[name]["candidates"]
    ]
    numbers = np.array([[a - b, b] for a, b, _ in pairs], np.float32)
    numbers = (numbers - numbers.mean(axis=0)) / numbers.std(axis=0)
    names = sorted({name for *_, name in pairs})
    classes = np.array([[names.index(name)] for *_, name in pairs])
    return ids, Guide(numbers=numbers, classes=classes, sizes=(len(names),))


def test_numbers_and_classes_are_learned_and_a_checkpoint_is_left(tmp_path, backbone, lesson):
    settings = FAST.model_copy(update={"epochs": 8})
    curve = train_guided(*lesson, backbone, tmp_path / "out", settings)["curve"]
    for name in ("numbers", "classes"):
        early, late = (np.mean([line[name] for line in part]) for part in (curve[:5], curve[-5:]))
        assert late < 0.8 * early
    item = {"prompt": "a", "reference": "The quick dog", "output": "THE QUICK DOG"}
    assert np.isfinite(Scorer.load(tmp_path / "out").score([item])).all()
    assert RewardModel.load(tmp_path / "out").record.stage == "pretrain"


def test_a_stopped_run_goes_on_with_the_same_numbers(tmp_path, backbone, lesson, monkeypatch):
    whole = train_guided(*lesson, backbone, tmp_path / "whole", FAST)
    settings = FAST.model_copy(update={"save_seconds": 1e-9})
    steps = guided._Run._take_step

    def stops(run, batch):
        if run.step == 4:
            raise KeyboardInterrupt
        return steps(run, batch)

    monkeypatch.setattr(guided._Run, "_take_step", stops)
    with pytest.raises(KeyboardInterrupt):
        train_guided(*lesson, backbone, tmp_path / "parts", settings)
    assert resume.newest(tmp_path / "parts").name.endswith("4")
    monkeypatch.setattr(guided._Run, "_take_step", steps)
    parts = train_guided(*lesson, backbone, tmp_path / "parts", settings)
    for a, b in zip(whole["curve"], parts["curve"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert train_guided(*lesson, backbone, tmp_path / "parts", settings) == parts
    other = settings.model_copy(update={"lr": 1e-4})
    with pytest.raises(ResumeError, match="lr"):
        train_guided(*lesson, backbone, tmp_path / "parts", other)


def test_ctrl_c_saves_the_step_in_hand(tmp_path, backbone, lesson, monkeypatch):
    steps = guided._Run._take_step

    def pressed_in_the_middle(run, batch):
        if run.step == 4:
            signal.raise_signal(signal.SIGINT)
        return steps(run, batch)

    monkeypatch.setattr(guided._Run, "_take_step", pressed_in_the_middle)
    with handled(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        train_guided(*lesson, backbone, tmp_path / "out", FAST)
    assert resume.newest(tmp_path / "out").name == "step-000000005"
    assert not (tmp_path / "out" / "training.json").exists()


def test_after_its_share_only_ranks_count(tmp_path, backbone, lesson):
    settings = FAST.model_copy(update={"until": 0.5})
    curve = train_guided(*lesson, backbone, tmp_path / "out", settings)["curve"]
    assert "numbers" in curve[0]
    assert "numbers" not in curve[-1]


def test_a_guide_of_other_candidates_is_refused(tmp_path, backbone, lesson):
    ids, guide = lesson
    short = Guide(numbers=guide.numbers[:-1], classes=guide.classes[:-1], sizes=guide.sizes)
    with pytest.raises(BadGroupsError, match=str(len(guide.numbers) - 1)):
        train_guided(ids, short, backbone, tmp_path / "out", FAST)


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(tmp_path, backbone, lesson):
    ids, guide = lesson
    broken = Guide(
        numbers=np.full_like(guide.numbers, np.nan), classes=guide.classes, sizes=guide.sizes
    )
    with pytest.raises(DivergedError, match=r"batch with g\d+"):
        train_guided(ids, broken, backbone, tmp_path / "out", FAST)
