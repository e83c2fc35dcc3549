"""Training learns, does not depend on layout or parts, and goes on where it was stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.conftest import handled, make_groups
from trainer import distributed, loop, resume
from trainer.data import read_groups
from trainer.errors import BadGroupsError, DivergedError, ResumeError, TrainerError
from trainer.loop import train
from trainer.model import RewardModel
from trainer.packing import tokenise
from trainer.score import Scorer
from trainer.settings import TrainSettings, read_settings

FAST = {
    "lr": 3e-3,
    "batch_groups": 16,
    "log_every": 1,
    "max_steps": 8,
    "epochs": 3,
    "precision": "fp32",
}


def run(groups_file, backbone, out, **changes):
    settings = TrainSettings(**{**FAST, **changes})
    return train([groups_file], backbone, out, settings, stage="pretrain")


def losses(summary):
    return [line["loss"] for line in summary["curve"]]


def test_it_learns_what_a_reference_is_for(tmp_path, backbone):
    table = make_groups(250, k=2)
    pq.write_table(table, tmp_path / "g.parquet")
    notes = []
    summary = train(
        [tmp_path / "g.parquet"],
        backbone,
        tmp_path / "out",
        TrainSettings(lr=5e-3, batch_groups=10, epochs=3),
        stage="pretrain",
        parents=["p1"],
        snapshot=7,
        checkpoint_id="c1",
        progress=lambda done, total, note: notes.append((done, total, note)),
    )
    assert summary["steps"] == 60
    assert summary["pairs"] == 200 * 3
    assert summary["counts"]["other_split"] == 50
    assert summary["curve"][0]["loss"] > 0.6
    assert notes[-1][:2] == (1000, 1000)
    record = RewardModel.load(tmp_path / "out").record
    assert (record.stage, record.wrapper) == ("pretrain", "pretrain")
    assert (record.parents, record.snapshot, record.checkpoint_id) == (("p1",), 7, "c1")
    held_out = read_groups([tmp_path / "g.parquet"]).filter(
        [split == "eval" for split in table.column("split").to_pylist()]
    )
    scores = Scorer.load(tmp_path / "out").score_groups(held_out)
    right = [
        s[i] > s[j]
        for s, row in zip(scores, held_out.column("candidates").to_pylist(), strict=True)
        for i, a in enumerate(row)
        for j, b in enumerate(row)
        if a["rank"] < b["rank"]
    ]
    assert np.mean(right) > 0.75


def test_layout_and_parts_of_a_batch_do_not_matter(tmp_path, groups_file, backbone):
    plain = run(groups_file, backbone, tmp_path / "a", layout="separate", max_steps=4)
    for name, changes in {
        "shared": {},
        "parts": {"micro_tokens": 600},
        "one by one": {"micro_tokens": 1, "layout": "separate"},
    }.items():
        other = run(groups_file, backbone, tmp_path / name, **changes, max_steps=4)
        assert losses(other) == pytest.approx(losses(plain), rel=1e-5), name
    assert (tmp_path / "a" / "metrics.jsonl").read_text().count("\n") == 4


def test_bf16_stays_close(tmp_path, groups_file, backbone):
    full = run(groups_file, backbone, tmp_path / "a", max_steps=4)
    half = run(groups_file, backbone, tmp_path / "b", max_steps=4, precision="bf16")
    assert losses(half) == pytest.approx(losses(full), rel=0.05)
    weights = load_file(tmp_path / "b" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


class StoppedError(Exception):
    pass


def stopped_after(monkeypatch, step):
    """Make the run save at every step and die after `step` of them, as Ctrl-C would."""
    save = resume.save

    def save_and_stop(out, model, state, *rest):
        save(out, model, state, *rest)
        if state["step"] == step:
            raise StoppedError

    monkeypatch.setattr(loop.resume, "save", save_and_stop)


def undisturbed_and_gone_on(monkeypatch, groups_file, backbone, folder, **changes):
    """Summaries of a run, and of one that saves at every step, stops after four and goes on."""
    changes |= {"save_seconds": 1e-9}
    undisturbed = run(groups_file, backbone, folder / "a", **changes)
    stopped_after(monkeypatch, 4)
    with pytest.raises(StoppedError):
        run(groups_file, backbone, folder / "b", **changes)
    monkeypatch.undo()
    return undisturbed, run(groups_file, backbone, folder / "b", **changes)


def test_a_stopped_run_goes_on_with_the_same_numbers(tmp_path, groups_file, backbone, monkeypatch):
    changes = {"max_steps": 18, "epochs": 9, "save_seconds": 1e-9}
    undisturbed = run(groups_file, backbone, tmp_path / "a", **changes)
    for step in (1, 4, 8):
        stopped_after(monkeypatch, step)
        with pytest.raises(StoppedError):
            run(groups_file, backbone, tmp_path / "b", **changes)
        monkeypatch.undo()
        kept = tmp_path / "b" / "resume" / f"step-{step:09d}"
        assert resume.newest(tmp_path / "b") == kept
        Scorer.load(kept)
    resumed = run(groups_file, backbone, tmp_path / "b", **changes, micro_tokens=16385)
    assert losses(resumed) == losses(undisturbed)
    assert [line["step"] for line in resumed["curve"]] == list(range(1, 19))
    assert resumed["pairs"] == undisturbed["pairs"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (tmp_path / "b" / "resume").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_step_in_hand_saves_it_and_loses_nothing(
    tmp_path, groups_file, backbone, monkeypatch, number
):
    undisturbed = run(groups_file, backbone, tmp_path / "a", log_every=3, max_steps=8)
    take = loop.Stepper.take

    def pressed_in_the_middle(self, batch, step, rate):
        if step == 4:
            signal.raise_signal(number)
        return take(self, batch, step, rate)

    monkeypatch.setattr(loop.Stepper, "take", pressed_in_the_middle)
    with handled(number, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        run(groups_file, backbone, tmp_path / "b", log_every=3, max_steps=8)
    monkeypatch.undo()
    assert resume.newest(tmp_path / "b").name == "step-000000005"
    resumed = run(groups_file, backbone, tmp_path / "b", log_every=3, max_steps=8)
    assert losses(resumed) == losses(undisturbed)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_interval_goes_on_where_it_was_stopped(tmp_path, groups_file, backbone, monkeypatch):
    undisturbed, resumed = undisturbed_and_gone_on(
        monkeypatch, groups_file, backbone, tmp_path, log_every=3, max_steps=8
    )
    assert losses(resumed) == losses(undisturbed)
    assert [line["step"] for line in resumed["curve"]] == [3, 6, 8]


def test_a_finished_run_is_not_made_again(tmp_path, groups_file, backbone):
    first = run(groups_file, backbone, tmp_path / "out", max_steps=2)
    written = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert run(groups_file, backbone, tmp_path / "out", max_steps=2, log_every=2) == first
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written


def test_another_run_in_the_same_folder_is_refused_with_the_difference(
    tmp_path, groups_file, backbone, monkeypatch
):
    run(groups_file, backbone, tmp_path / "out", max_steps=2)
    with pytest.raises(ResumeError, match=r"lr: 0.003 there, 0.001 now"):
        run(groups_file, backbone, tmp_path / "out", max_steps=2, lr=1e-3)
    stopped_after(monkeypatch, 2)
    with pytest.raises(StoppedError):
        run(groups_file, backbone, tmp_path / "half", save_seconds=1e-9)
    with pytest.raises(ResumeError, match=r"seed: 0 there, 1 now"):
        run(groups_file, backbone, tmp_path / "half", save_seconds=1e-9, seed=1)


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors"])
def test_a_damaged_state_is_refused_in_words(tmp_path, groups_file, backbone, monkeypatch, name):
    stopped_after(monkeypatch, 2)
    with pytest.raises(StoppedError):
        run(groups_file, backbone, tmp_path / "out", save_seconds=1e-9)
    monkeypatch.undo()
    file = tmp_path / "out" / "resume" / "step-000000002" / name
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ResumeError, match="to train from the start"):
        run(groups_file, backbone, tmp_path / "out", save_seconds=1e-9)


def test_a_kill_while_saving_leaves_the_checkpoint_before(
    tmp_path, groups_file, backbone, monkeypatch
):
    save = RewardModel.save

    def dies_at_the_third(self, path, weights):
        save(self, path, weights)
        dies_at_the_third.times += 1
        if dies_at_the_third.times == 3:
            (path / "polar.json").unlink()
            raise StoppedError

    dies_at_the_third.times = 0
    monkeypatch.setattr(RewardModel, "save", dies_at_the_third)
    with pytest.raises(StoppedError):
        run(groups_file, backbone, tmp_path / "out", save_seconds=1e-9)
    monkeypatch.undo()
    assert (tmp_path / "out" / "resume" / "unfinished").exists()
    Scorer.load(resume.newest(tmp_path / "out"))
    resumed = run(groups_file, backbone, tmp_path / "out", save_seconds=1e-9)
    assert losses(resumed) == losses(run(groups_file, backbone, tmp_path / "a"))


@pytest.mark.slow
def test_sigkill_at_any_time_leaves_something_to_go_on_from(tmp_path, groups_file, backbone):
    words = [f"{key}={value}" for key, value in {**FAST, "max_steps": 60}.items()]
    words += ["epochs=30", "save_seconds=0.01"]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "trainer", "pretrain", "--groups", str(groups_file)]
    command += ["--start", str(backbone), "--out", str(out)]
    for word in words:
        command += ["--set", word]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    for kill in range(3):
        process = subprocess.Popen(command, cwd=root, env=environment)
        deadline = time.monotonic() + 120
        before = resume.newest(out)
        while resume.newest(out) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        Scorer.load(resume.newest(out))
    subprocess.run(command, cwd=root, env=environment, check=True)
    undisturbed = run(groups_file, backbone, tmp_path / "a", max_steps=60, epochs=30)
    found = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]
    assert found == pytest.approx(losses(undisturbed), rel=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good(
    tmp_path, groups_file, backbone, monkeypatch
):
    real, named = distributed.Scores.forward, []

    def poisoned(self, pieces):
        scores = real(self, pieces)
        if resume.read_log(tmp_path / "out")[-1:] and len(named) < 1:
            at = resume.read_log(tmp_path / "out")[-1]["step"]
            if at == 3:
                size = len(pieces[0][1])
                named.append(pieces[0])
                return torch.cat([scores[:size] * float("nan"), scores[size:]])
        return scores

    monkeypatch.setattr(distributed.Scores, "forward", poisoned)
    with pytest.raises(DivergedError) as error:
        run(groups_file, backbone, tmp_path / "out")  # nothing was saved until then
    said = str(error.value)
    assert "step 4: loss nan" in said
    kept = tmp_path / "out" / "resume" / "step-000000003"
    assert f"{kept} holds the last good weights" in said
    (culprit,) = re.findall(r"in groups (g\d+);", said)
    ids, _ = tokenise([groups_file], RewardModel.start(backbone, wrapper="pretrain").template)
    found = ids.group_ids.index(culprit)
    assert np.array_equal(ids.suffixes(found)[0], named[0][1][0])
    Scorer.load(kept)
    resumed = run(groups_file, backbone, tmp_path / "out")
    monkeypatch.undo()
    assert losses(resumed) == losses(run(groups_file, backbone, tmp_path / "a"))
    run(groups_file, tmp_path / "a", tmp_path / "b", max_steps=1, lr=1e-4)


def test_weights_that_a_step_has_spoilt_are_not_saved(tmp_path, groups_file, backbone, monkeypatch):
    changes = {"save_seconds": 1e-9, "clip": 1.0}
    rates = iter([1e-3, 1e-3, float("inf"), 1e-3])
    monkeypatch.setattr(loop, "learning_rate", lambda *_: next(rates))
    with pytest.raises(DivergedError, match=r"step 4: .*step-000000002 holds the last good"):
        run(groups_file, backbone, tmp_path / "out", **changes)
    Scorer.load(tmp_path / "out" / "resume" / "step-000000002")


def test_seconds_end_a_run(tmp_path, groups_file, backbone, monkeypatch):
    clock = iter(np.arange(0, 10, 0.05))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    settings = {"max_seconds": 1.0, "epochs": 10_000, "max_steps": None}
    summary = run(groups_file, backbone, tmp_path / "out", **settings)
    assert summary["seconds"] == pytest.approx(1.0)
    rates = [line["lr"] for line in summary["curve"]]
    assert len(rates) == 20
    assert rates[-1] < 0.2 * max(rates)


def test_groups_that_teach_nothing_are_refused(tmp_path, backbone):
    path = tmp_path / "g.jsonl"
    path.write_text(json.dumps({"prompt": "p", "reference": "r", "chosen": "a", "rejected": "a"}))
    with pytest.raises(BadGroupsError, match="'equal_ids': 1"):
        run(path, backbone, tmp_path / "out")


def test_settings_are_read_from_yaml_and_words(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 0.01\nepochs: 3\n")
    settings = read_settings(path, ["lr=3e-4", "max_steps=5", "precision=bf16"])
    assert (settings.lr, settings.epochs, settings.max_steps) == (3e-4, 3, 5)
    listed = read_settings(None, ["betas=0.8, 0.9", "lora.targets=q_proj,v_proj"])
    assert listed.betas == (0.8, 0.9)
    assert listed.lora.targets == ("q_proj", "v_proj")
    with pytest.raises(TrainerError, match="betas"):
        read_settings(None, ["betas=0.9"])
    with pytest.raises(TrainerError, match="unknown setting 'batchgroups'; did you mean 'batch_g"):
        read_settings(None, ["batchgroups=3"])
    with pytest.raises(TrainerError, match="lr: .*greater than 0"):
        read_settings(None, ["lr=-1"])
    with pytest.raises(TrainerError, match="name=value"):
        read_settings(None, ["lr"])
    with pytest.raises(TrainerError, match="together"):
        read_settings(None, ["max_length=100"])
    path.write_text("- a")
    with pytest.raises(TrainerError, match="a mapping"):
        read_settings(path)
