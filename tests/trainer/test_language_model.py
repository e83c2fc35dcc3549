"""Next-token training: tokenizers that keep text, training that repeats, documents that compare."""

from __future__ import annotations

import signal

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.conftest import handled
from trainer import language_model
from trainer.data import GROUPS_SCHEMA
from trainer.errors import BadGroupsError, DivergedError, ResumeError
from trainer.language_model import (
    EOS,
    _batches,
    _encode,
    documents_from_groups,
    schedule,
    train,
    train_tokenizer,
)
from trainer.language_settings import LanguageModelSettings
from trainer.resume import only_trainer, read_log
from trainer.template import REWARD, SEPARATOR, Template, Texts

TEXTS = [f"the {a} {b} sings at {c}." for a in ["old", "new"] for b in ["cat", "owl"]
         for c in ["dawn", "dusk", "noon"]]  # fmt: skip
TINY = LanguageModelSettings(
    hidden=32,
    layers=1,
    heads=1,
    intermediate=32,
    context=64,
    steps=30,
    batch_tokens=64,
    save_at=(7,),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, 320, tmp_path_factory.mktemp("tokenizer"), context=64)


@pytest.fixture(scope="module")
def loaded(tokenizer):
    return AutoTokenizer.from_pretrained(tokenizer)


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "run"
    seen: list[tuple[int, int, str]] = []
    metrics = train(TEXTS, tokenizer, out, TINY, progress=lambda *p: seen.append(p))
    return out, metrics, seen


def test_tokenizer_has_the_tokens_that_training_and_scoring_need(loaded):
    assert len({loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id}) == 3
    for token in (SEPARATOR, REWARD):
        assert loaded.encode(token, add_special_tokens=False) == [
            loaded.convert_tokens_to_ids(token)
        ]
    assert loaded.encode("the cat") == [
        loaded.bos_token_id,
        *loaded.encode("the cat", add_special_tokens=False),
    ]


@given(text=st.text(max_size=40))
def test_text_comes_back(loaded, text):
    ids = loaded.encode(text, add_special_tokens=False)
    special = (SEPARATOR, REWARD, EOS, "<s>", "<pad>")
    if not any(token in text for token in special):
        assert loaded.decode(ids) == text


def test_training_learns_and_writes_a_plain_checkpoint(trained, loaded):
    out, metrics, seen = trained
    assert metrics["loss"] < 4.5  # ln(320) is 5.8
    assert metrics["steps"] == 30
    assert [done for done, _, _ in seen] == list(range(1, 31))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out).get_vocab() == loaded.get_vocab()
    assert model.config.pad_token_id == loaded.pad_token_id
    assert not list(out.parent.glob("*.draft"))
    log = read_log(out)
    assert [line["step"] for line in log] == list(range(1, 31))
    assert log[-1]["loss"] < log[0]["loss"]


def test_checkpoints_on_the_way_differ_from_the_last(trained):
    out, _, _ = trained
    early = AutoModelForCausalLM.from_pretrained(out / "step-7").state_dict()
    late = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert any(not torch.equal(early[name], late[name]) for name in late)


def test_training_again_gives_the_same_weights(trained, tokenizer, tmp_path):
    train(TEXTS, tokenizer, tmp_path / "again", TINY)
    first = AutoModelForCausalLM.from_pretrained(trained[0]).state_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_training_says_nothing_of_its_own(trained, tokenizer, tmp_path, capfd):
    few = TINY.model_copy(update={"steps": 2, "save_at": ()})
    train(TEXTS, tokenizer, tmp_path / "quiet", few, start=trained[0])
    said = capfd.readouterr()
    assert said.out + said.err == ""  # no bar of a library amid those of a run


def test_training_goes_on_from_a_checkpoint(trained, tokenizer, tmp_path):
    out, metrics, _ = trained
    few = TINY.model_copy(update={"steps": 10, "hidden": 64, "save_at": ()})
    further = train(TEXTS, tokenizer, tmp_path / "further", few, start=out)
    assert further["loss"] < metrics["loss"]
    assert further["parameters"] == metrics["parameters"]  # sizes are the start's


class KilledError(Exception):
    pass


def stop_at(step, action):
    """A progress that stops the training at a step."""

    def progress(done, _of, _note):
        if done == step:
            action()

    return progress


def killed():
    raise KilledError


def interrupted():
    signal.raise_signal(signal.SIGINT)


def same(one, other):
    """Whether two finished trainings have the same weights and the same log."""
    first, second = (AutoModelForCausalLM.from_pretrained(out).state_dict() for out in (one, other))
    return read_log(one) == read_log(other) and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("step", [1, 7, 28])
def test_ctrl_c_saves_and_the_same_training_goes_on(
    trained, tokenizer, tmp_path, monkeypatch, step
):
    whole, metrics, _ = trained
    out, seen = tmp_path / "run", []
    with handled(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        train(TEXTS, tokenizer, out, TINY, stop_at(step, interrupted))
    assert not (out / "config.json").exists()
    resumed = train(TEXTS, tokenizer, out, TINY, lambda done, *_: seen.append(done))
    assert seen == list(range(step + 2, 31))  # the step under way was taken to its end
    assert same(out, whole)
    assert {**resumed, "seconds": 0} == {**metrics, "seconds": 0}
    assert (out / "step-7" / "config.json").is_file()
    assert not (out / "resume").exists()


def test_a_killed_training_goes_on_from_what_it_saved(trained, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "SAVE_SECONDS", 0.0)
    out, seen = tmp_path / "run", []
    with pytest.raises(KilledError):
        train(TEXTS, tokenizer, out, TINY, stop_at(12, killed))
    (out / "resume" / "state.draft").write_bytes(b"cut off")  # killed while it saved again
    train(TEXTS, tokenizer, out, TINY, lambda done, *_: seen.append(done))
    assert seen[0] == 13
    assert same(out, trained[0])


def test_what_another_training_left_is_passed_over(trained, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "SAVE_SECONDS", 0.0)
    out = tmp_path / "run"
    for documents, changes, start in [
        (TEXTS, {"seed": 1}, None),
        (TEXTS[1:], {}, None),
        (TEXTS, {}, trained[0]),
    ]:
        settings = TINY.model_copy(update=changes)
        with pytest.raises(KilledError):
            train(documents, tokenizer, out, settings, stop_at(3, killed), start)
        assert (out / "resume" / "state.pt").is_file()
        with pytest.raises(KilledError):
            train(TEXTS, tokenizer, out, TINY, stop_at(1, killed))  # begins at the first step


def test_what_cannot_be_gone_on_with_is_an_error_that_says_what_to_do(tokenizer, tmp_path):
    state = tmp_path / "run" / "resume" / "state.pt"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ResumeError, match=r"state.pt: cannot go on .*remove it to train from the"):
        train(TEXTS, tokenizer, tmp_path / "run", TINY)
    state.unlink()
    with only_trainer(tmp_path / "run"), pytest.raises(ResumeError, match="another trainer"):
        train(TEXTS, tokenizer, tmp_path / "run", TINY)


def test_a_loss_that_is_no_number_stops_the_training(trained, tokenizer, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(trained[0])
    with torch.no_grad():
        broken.model.norm.weight[3] = float("inf")
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(DivergedError, match=r"step 1: loss nan; lower learning_rate \(now 0.005\)"):
        train(TEXTS, tokenizer, tmp_path / "run", TINY, start=tmp_path / "broken")
    assert not (tmp_path / "run" / "config.json").exists()


def test_no_documents_is_an_error_that_says_what_to_do(tokenizer, tmp_path):
    with pytest.raises(BadGroupsError, match="make its trajectories"):
        train([], tokenizer, tmp_path / "none", TINY)


def test_documents_become_bos_to_eos_with_separators_between_parts(loaded):
    (row,) = _encode([("the cat", f"owl {SEPARATOR}")], loaded, 64)
    separator = loaded.convert_tokens_to_ids(SEPARATOR)
    assert row[0] == loaded.bos_token_id
    assert row[-1] == loaded.eos_token_id
    assert list(row).count(separator) == 1  # what a text spells stays text


def test_of_long_documents_every_id_is_predicted_once(loaded):
    whole = _encode(["the old cat sings at noon." * 9], loaded, 10_000)[0]
    pieces = _encode(["the old cat sings at noon." * 9], loaded, 16)
    assert max(map(len, pieces)) == 16
    assert [i for piece in pieces for i in piece[1:]] == list(whole)[1:]


def test_every_document_is_seen_once_before_any_is_seen_twice(loaded):
    rows = _encode(TEXTS, loaded, 64)
    epoch, seen = _batches(rows, TINY), []
    while len(seen) < len(rows):
        batch = next(epoch)
        assert len(batch) * max(map(len, batch)) <= TINY.batch_tokens
        seen += [row.tobytes() for row in batch]
    assert sorted(seen) == sorted(row.tobytes() for row in rows)


def test_learning_rate_rises_then_falls_to_its_share():
    shares = [schedule(step, TINY) for step in range(TINY.steps)]
    top = shares.index(1.0)
    assert shares[: top + 1] == sorted(shares[: top + 1])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert shares[-1] < 0.12


@pytest.mark.parametrize("wrapper", ["pretrain", "sft"])
def test_backbone_documents_are_what_the_reward_model_will_read(loaded, wrapper):
    row = {
        "group_id": "g",
        "wrapper": wrapper,
        "prompt": [{"role": "user", "content": "the old cat"}],
        "reference": " sings at dawn.",
        "candidates": [
            {"text": " sings at noon.", "rank": 1},
            {"text": " sings at dusk.", "rank": 0},
        ],
        "split": "train",
        "cell": "seen",
    }
    (document,) = documents_from_groups(pa.Table.from_pylist([row], GROUPS_SCHEMA))
    (ids,) = _encode([document], loaded, 64)
    texts = Texts("the old cat", " sings at dawn.", [" sings at dusk."], wrapper)
    ((scored,),) = Template(loaded).encode([texts])
    assert list(ids[:-1]) == scored[:-1]  # then EOS stands where the reward token does
