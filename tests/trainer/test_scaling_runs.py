"""Runs of a scaling plan: what they leave, what is gone on with, and what is trained again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer import language_model, loop
from trainer.errors import BadGroupsError, TrainerError
from trainer.model import RewardModel
from trainer.scaling import ScalingPlan
from trainer.scaling_runs import Corpus, finished, measure, read_corpus, shares_of, train_run


def plan_of(**pretrain: Any) -> ScalingPlan:
    return ScalingPlan.model_validate(
        {
            "vocabulary": 400,
            "cell": "seen",
            "language": {"layers": 1, "heads": 1, "context": 256, "steps": 4, "batch_tokens": 512},
            "pretrain": {"max_steps": 4, "epochs": 9, "batch_groups": 8, "log_every": 1} | pretrain,
            "sizes": [
                {
                    "name": f"w{w}",
                    "seeds": [0, 1, 2] if w < 24 else [0],
                    "language": {"hidden": w, "intermediate": 2 * w},
                }
                for w in (8, 16, 24, 32, 48)
            ],
        }
    )


@pytest.fixture
def corpus(groups_file: Path, tmp_path: Path) -> Corpus:
    return read_corpus(plan_of(), groups_file, groups_file, tmp_path / "tokenizer")


def count_trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is trained from now on."""
    done: list[str] = []
    steps, take = language_model._steps, loop._Run._take_step
    monkeypatch.setattr(
        language_model, "_steps", lambda *a: (done.append("language"), steps(*a))[1]
    )
    monkeypatch.setattr(
        loop._Run, "_take_step", lambda self, b: (done.append("pretrain"), take(self, b))[1]
    )
    return done


def test_a_run_is_measured_and_not_trained_twice(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, out = plan_of().runs[3], tmp_path / "run"
    assert not finished(out, "key")
    summary = train_run(run, corpus, out, "key")
    assert finished(out, "key")
    network = RewardModel.load(out).network
    embedding = network.get_input_embeddings().weight.numel()
    assert run.size.parameters == sum(p.numel() for p in network.parameters()) - embedding
    result = measure(summary, corpus, out)
    assert result.losses.shape == (len(corpus.pairs),)
    assert len(corpus.pairs) + corpus.held_out.sibling.sum() == len(corpus.held_out)
    assert result.tokens > result.language_tokens > 100
    assert abs(result.losses.mean() - np.log(2)) < 0.3  # so little training teaches next to nothing

    done = count_trainings(monkeypatch)
    assert train_run(run, corpus, out, "key") == summary
    assert done == []
    train_run(run, corpus, out, "another key")
    assert done == ["language"] + ["pretrain"] * 4


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_numbers_that_it_would_have_had(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = plan_of(save_seconds=1e-6).runs[-1]
    whole = train_run(run, corpus, tmp_path / "whole", "key")

    def stop(done: int, of: int, note: str) -> None:
        if note.startswith("step 3"):
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.time, "perf_counter", iter(range(0, 10**6)).__next__)
    with pytest.raises(KeyboardInterrupt):
        train_run(run, corpus, tmp_path / "run", "key", stop)
    assert not finished(tmp_path / "run", "key")
    done = count_trainings(monkeypatch)
    resumed = train_run(run, corpus, tmp_path / "run", "key")
    assert 0 < len(done) < 4
    assert "language" not in done
    losses = [line["loss"] for line in resumed["curve"]]
    assert losses == [line["loss"] for line in whole["curve"]]


@pytest.mark.slow
def test_progress_never_goes_back_and_ends_at_the_whole(corpus: Corpus, tmp_path: Path):
    told: list[tuple[int, int, str]] = []
    runs = plan_of().runs[-2:]
    progress = shares_of(runs, lambda *line: told.append(line))
    for run in runs:
        train_run(run, corpus, tmp_path / run.name, "key", progress[run.name])
    counts = [done for done, _, _ in told]
    assert counts == sorted(counts)
    assert told[-1][:2] == (1000, 1000)
    assert told[0][2].startswith("w32-s0, 1 of 2: language, ")
    assert told[-1][2].startswith("w48-s0, 2 of 2: step 4")


@pytest.mark.slow
def test_a_budget_that_the_epochs_end_early_is_an_error(corpus: Corpus, tmp_path: Path):
    run = plan_of(epochs=1, max_steps=999).runs[0]
    with pytest.raises(TrainerError, match="of 999 steps: raise pretrain.epochs"):
        train_run(run, corpus, tmp_path / "run", "key")


def test_a_cell_without_held_out_pairs_is_named(groups_file: Path, tmp_path: Path):
    plan = plan_of().model_copy(update={"cell": "both_new"})
    with pytest.raises(BadGroupsError, match="0 held-out pairs of cell 'both_new'"):
        read_corpus(plan, groups_file, groups_file, tmp_path / "tokenizer")
