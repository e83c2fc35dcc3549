"""Checkpoints are plain transformers folders, and what is not one is refused in words."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.trainer.conftest import tiny_llama
from trainer.errors import BadCheckpointError
from trainer.layout import separate
from trainer.model import RewardModel
from trainer.template import REWARD, SEPARATOR, Limits, Texts


@pytest.fixture
def model(backbone):
    model = RewardModel.start(backbone, wrapper="sft")
    torch.manual_seed(1)
    torch.nn.init.normal_(model.network.score.weight, std=0.5)
    return model


TEXTS = [
    Texts("What is 12 + 30?", "42.", ["It is 42.", "41", ""]),
    Texts("", "a reference", ["the sea " * 8], "pretrain"),
    Texts("How many planets are there? " * 20, "Eight.", ["Eight planets.", "Nine"]),
]


def test_plain_transformers_gives_the_same_scores(model, tmp_path):
    model.save(tmp_path / "c")
    sequences = [ids for group in model.template.encode(TEXTS) for ids in group]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "c")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    batch = tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        expected = plain(**batch).logits.squeeze(-1)
        found = separate(
            RewardModel.load(tmp_path / "c").network,
            [(np.asarray(ids[:0]), [np.asarray(ids)]) for ids in sequences],
        )
    assert plain.config.num_labels == 1
    assert expected.std() > 0.1
    assert torch.allclose(expected, found, atol=1e-4)


def test_saving_and_loading_changes_nothing(model, tmp_path):
    model.save(tmp_path / "c")
    again = RewardModel.load(tmp_path / "c")
    assert again.record == model.record
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name
    assert again.template.encode(TEXTS) == model.template.encode(TEXTS)


def test_a_language_model_gets_marks_a_zero_head_and_limits_that_fit(backbone, tokenizer):
    model = RewardModel.start(backbone, wrapper="pretrain")
    network, record = model.network, model.record
    assert (record.max_length, record.max_response_length) == (256, 64)
    assert record.separator.token == SEPARATOR
    assert record.reward.token == REWARD
    assert not network.score.weight.any()
    assert network.score.bias is None
    assert network.config.pad_token_id not in (record.separator.id, record.reward.id)
    lm = tiny_llama(len(tokenizer)).state_dict()
    table = network.get_input_embeddings().weight
    assert torch.equal(table[: len(tokenizer)], lm["model.embed_tokens.weight"])
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(network.state_dict()[name], lm[name])
    assert not torch.equal(table[record.separator.id], table[record.reward.id])


def test_a_checkpoint_is_a_start_too(model, tmp_path):
    model.save(tmp_path / "c")
    again = RewardModel.start(tmp_path / "c", wrapper="pretrain", limits=Limits(128, 32))
    assert again.record.wrapper == "pretrain"
    assert (again.record.max_length, again.record.max_response_length) == (128, 32)
    assert torch.equal(again.network.score.weight, model.network.score.weight)


def damaged(path, case):
    weights = path / "model.safetensors"
    record = json.loads((path / "polar.json").read_text())
    if case == "none":
        shutil.rmtree(path)
    elif case == "empty":
        shutil.rmtree(path)
        path.mkdir()
    elif case == "other":
        (path / "polar.json").unlink()
    elif case == "record":
        (path / "polar.json").write_text(json.dumps({**record, "wrapper": "chat"}))
    elif case == "weights":
        weights.unlink()
    elif case == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif case == "head":
        state = load_file(weights)
        del state["score.weight"]
        save_file(state, weights, metadata={"format": "pt"})
    elif case == "nan":
        state = load_file(weights)
        state["score.weight"][0, 3] = float("nan")
        save_file(state, weights, metadata={"format": "pt"})
    elif case == "ids":
        record["reward"]["id"] += 1
        (path / "polar.json").write_text(json.dumps(record))
    elif case == "tokenizer":
        (path / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("none", "no such folder"),
        ("empty", "it holds no model at all"),
        ("other", "python -m trainer pretrain"),
        ("record", "wrapper: Input should be 'pretrain' or 'sft'"),
        ("weights", "transformers cannot load it"),
        ("cut", "transformers cannot load it"),
        ("head", "weights are missing or of another shape: score.weight"),
        ("nan", "weights are not finite numbers: score.weight"),
        ("ids", "restore the tokenizer"),
        ("tokenizer", "tokenizer"),
    ],
)
def test_what_is_not_a_checkpoint_is_refused_in_words(model, tmp_path, case, said):
    path = tmp_path / "c"
    model.save(path)
    damaged(path, case)
    with pytest.raises(BadCheckpointError) as error:
        RewardModel.load(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)
