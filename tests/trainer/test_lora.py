"""Adapters: only they and the head learn, what is saved is merged and plain, and it resumes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.test_loop import FAST, losses, run
from trainer import loop, lora
from trainer.data import read_groups
from trainer.errors import TrainerError
from trainer.model import RewardModel
from trainer.score import Scorer
from trainer.settings import LoraSettings, TrainSettings, read_settings

ADAPTERS = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def start(tmp_path_factory, groups_file, backbone):
    """A POLAR checkpoint whose head is not zero."""
    out = tmp_path_factory.mktemp("lora") / "start"
    run(groups_file, backbone, out, max_steps=3)
    return out


def groups_of(file):
    return read_groups([file]).slice(0, 20)


def adapted(start, **changes):
    """A checkpoint with adapters that are not zero."""
    model = RewardModel.load(start)
    lora.attach(model.network, LoraSettings(**(ADAPTERS | changes)))
    with torch.no_grad():
        for name, tensor in lora.weights(model.network).items():
            if "lora_B" in name:
                tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_new_adapters_change_no_score(start, groups_file):
    groups = groups_of(groups_file)
    before = Scorer.load(start).score_groups(groups)
    model = RewardModel.load(start).place()
    lora.attach(model.network, LoraSettings(**ADAPTERS))
    for one, other in zip(Scorer(model).score_groups(groups), before, strict=True):
        assert torch.equal(torch.tensor(one), torch.tensor(other))


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj")])
def test_merged_scores_are_the_same_and_the_folder_is_plain(start, groups_file, tmp_path, targets):
    model = adapted(start, targets=targets)
    groups = groups_of(groups_file)
    with_adapters = Scorer(model).score_groups(groups)
    assert abs(with_adapters[0] - Scorer.load(start).score_groups(groups)[0]).max() > 1e-3
    model.save(tmp_path / "merged")
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert names == load_file(start / "model.safetensors").keys()
    assert {f.name for f in (tmp_path / "merged").iterdir()} <= {f.name for f in start.iterdir()}
    merged = Scorer.load(tmp_path / "merged").score_groups(groups)
    for one, other in zip(merged, with_adapters, strict=True):
        assert abs(one - other).max() <= 1e-5


def test_only_adapters_and_head_learn(start, groups_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop.resume, "finish", lambda out, model, *rest: seen.append(model.network))
    run(groups_file, start, tmp_path / "out", lora=ADAPTERS, lr=0.05)
    (network,) = seen
    before = RewardModel.load(start).network.state_dict()
    changed, kept = set(), set()
    for name, tensor in network.state_dict().items():
        plain = name.replace(".base_layer", "")
        if ".lora_" in name:
            changed.add(name.split(".")[-3])
        elif torch.equal(tensor.cpu(), before[plain]):
            kept.add(plain)
        else:
            changed.add(plain)
    assert changed == {"score.weight", "lora_A", "lora_B"}
    assert kept == before.keys() - {"score.weight"}
    merged = {name: tensor.cpu() for name, tensor in lora.merged(network).items()}
    assert merged.keys() == before.keys()
    moved = {name for name in before if not torch.equal(merged[name], before[name])}
    assert moved == {name for name in before if "proj" in name} | {"score.weight"}


class Stop(Exception):
    pass


def test_a_stopped_run_goes_on_with_the_same_losses(start, groups_file, tmp_path, monkeypatch):
    changes = {"lora": ADAPTERS | {"dropout": 0.1}, "max_steps": 14}
    whole = run(groups_file, start, tmp_path / "whole", **changes)
    taken = []
    take = loop._Run._take_step

    def stopping(self, batch):
        if len(taken) == 4:
            raise Stop
        taken.append(self.step)
        take(self, batch)

    monkeypatch.setattr(loop._Run, "_take_step", stopping)
    with pytest.raises(Stop):
        run(groups_file, start, tmp_path / "out", save_seconds=1e-9, **changes)
    monkeypatch.undo()
    saved = tmp_path / "out" / "resume" / "step-000000004"
    Scorer.load(saved).score_groups(groups_of(groups_file))  # complete, and plain
    resumed = run(groups_file, start, tmp_path / "out", save_seconds=1e-9, **changes)
    assert losses(resumed)[-10:] == losses(whole)[-10:]
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "out"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_adapters_kept_beside_load_with_peft_onto_the_start(start, groups_file, tmp_path):
    from peft import PeftModel

    run(groups_file, start, tmp_path / "out", lora=ADAPTERS | {"keep": True}, max_steps=3)
    base = RewardModel.load(start)
    network = PeftModel.from_pretrained(base.network, tmp_path / "out" / lora.FOLDER)
    base.network = network.merge_and_unload()
    groups = groups_of(groups_file)
    for one, other in zip(
        Scorer(base).score_groups(groups),
        Scorer.load(tmp_path / "out").score_groups(groups),
        strict=True,
    ):
        assert abs(one - other).max() <= 1e-5


def test_without_being_asked_no_adapters_are_kept(start, groups_file, tmp_path):
    run(groups_file, start, tmp_path / "out", lora=ADAPTERS, max_steps=1)
    assert not (tmp_path / "out" / lora.FOLDER).exists()


def test_targets_that_are_nowhere_are_named(start, groups_file, tmp_path):
    with pytest.raises(TrainerError, match="lora.targets .'nothing'"):
        run(groups_file, start, tmp_path / "out", lora=ADAPTERS | {"targets": ["nothing"]})


def test_settings_reach_into_adapters(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lora: {rank: 4}\n")
    settings = read_settings(file, ["lora.alpha=4", "lora.keep=true"])
    assert settings.lora == LoraSettings(rank=4, alpha=4, keep=True)
    assert read_settings(file, ["lora=none"]).lora is None
    assert read_settings(None, ["lora.rank=2"]).lora == LoraSettings(rank=2)
    with pytest.raises(TrainerError, match="'lora.rang'; did you mean 'lora.rank'"):
        read_settings(None, ["lora.rang=3"])
    assert TrainSettings(**FAST).lora is None
