"""What a run says of itself, what it shares with a slower one, and what it refuses in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.trainer.conftest import make_groups, tiny_llama
from tests.trainer.test_loop import StoppedError, losses, run, stopped_after
from trainer import attention, decoder, distributed, ids_cache, loop, resume, step
from trainer.errors import BadCheckpointError, BadGroupsError, LayoutError, ResumeError
from trainer.layout import separate
from trainer.metrics import Work
from trainer.model import RewardModel
from trainer.optim import adamw
from trainer.packing import tokenise
from trainer.score import Scorer
from trainer.settings import TrainSettings


@pytest.mark.usefixtures("on_cpu")
def test_checkpointing_runs_layers_twice_and_changes_nothing(
    tmp_path, groups_file, backbone, monkeypatch
):
    real, runs = decoder._layer, []
    monkeypatch.setattr(decoder, "_layer", lambda *args: runs.append(1) or real(*args))
    plain = run(groups_file, backbone, tmp_path / "a", max_steps=4)
    once = len(runs)
    lean = run(groups_file, backbone, tmp_path / "b", max_steps=4, checkpointing=True)
    first_check = 2  # layers, before the first step
    assert len(runs) - once == first_check + 2 * (once - first_check)
    assert losses(lean) == pytest.approx(losses(plain), rel=1e-6)


@pytest.mark.usefixtures("on_cpu")
def test_the_order_within_a_step_does_not_matter(tmp_path, groups_file, backbone, monkeypatch):
    plain = run(groups_file, backbone, tmp_path / "a", max_steps=4)
    real, orders = step.microbatches, []

    def backwards(*args, **kwargs):
        parts = real(*args, **kwargs)
        orders.extend(map(len, parts))
        return [part[::-1] for part in parts[::-1]]

    monkeypatch.setattr(step, "microbatches", backwards)
    other = run(groups_file, backbone, tmp_path / "c", max_steps=4)
    assert min(orders) > 1
    assert losses(other) != losses(plain)  # the sums are made in another order
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize("budget", [16384, 400])
def test_a_step_follows_the_mean_over_all_its_pairs(
    tmp_path, uneven_groups, backbone, monkeypatch, budget
):
    """Groups have one to six pairs, so a mean over groups, or over parts, is another number."""
    real, seen = distributed.clip_gradients, []

    def kept(network, largest):
        seen.append([p.grad.clone() for p in network.parameters()])
        return real(network, largest)

    monkeypatch.setattr(distributed, "clip_gradients", kept)
    changes = {"batch_groups": 99, "max_steps": 1, "micro_tokens": budget, "epochs": 1}
    summary = run(uneven_groups, backbone, tmp_path / "out", **changes)

    model = RewardModel.start(backbone, wrapper="pretrain").place()
    ids, _ = tokenise([uneven_groups], model.template)
    counts = [len(ids.suffixes(g)) for g in range(len(ids))]
    assert set(counts) == {2, 3, 4}
    pieces = [(ids.prefix(g), ids.suffixes(g)) for g in range(len(ids))]
    by_group = separate(model.network, pieces).split(counts)
    terms = [
        torch.nn.functional.softplus(scores[j] - scores[i])
        for g, scores in enumerate(by_group)
        for i, better in enumerate(ids.group_ranks(g))
        for j, worse in enumerate(ids.group_ranks(g))
        if better < worse
    ]
    torch.stack(terms).mean().backward()
    wanted = [p.grad for p in model.network.parameters()]
    largest = max(float(grad.abs().max()) for grad in wanted)
    assert largest > 0
    for mine, theirs in zip(seen[0], wanted, strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-5 * largest
    norm = float(torch.cat([grad.flatten() for grad in wanted]).norm())
    assert summary["curve"][0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert summary["pairs"] == len(terms)


def test_the_optimiser_is_the_fused_one(backbone):
    model = RewardModel.start(backbone, wrapper="pretrain")
    assert adamw(model.network, TrainSettings()).defaults["fused"]


def test_an_interval_says_what_was_run(tmp_path, groups_file, backbone):
    summary = run(groups_file, backbone, tmp_path / "a", epochs=1, max_steps=None, tensorboard=True)
    model = RewardModel.start(backbone, wrapper="pretrain")
    ids, _ = tokenise([groups_file], model.template)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open()]
    assert lines == summary["curve"]
    seconds = np.diff([0.0, *(line["seconds"] for line in lines)])

    def total(name):
        return sum(line[name] * s for line, s in zip(lines, seconds, strict=True))

    assert total("pairs_per_s") == pytest.approx(summary["pairs"], rel=0.02)
    assert total("official_tokens_per_s") == pytest.approx(ids.official().sum(), rel=0.02)
    work = Work(model.network)
    operations = work.per_id * ids.distinct().sum() + work.per_pair * ids.seen().sum()
    assert total("flop_per_s") == pytest.approx(operations, rel=0.02)
    assert all(0 <= line["padding"] < 1 / 32 for line in lines)
    assert all(10**7 < line["memory_bytes"] < 10**11 for line in lines)
    assert summary["tokens"] < ids.official().sum()  # three pairs of three, two ids of each six
    padded = run(groups_file, backbone, tmp_path / "b", layout="separate", epochs=1, max_steps=None)
    filled = [line["padding"] for line in padded["curve"]]
    assert all(0 < share < 0.4 for share in filled)
    longest = max(map(int, ids.lengths()))
    assert max(filled) < 1 - padded["tokens"] / (3 * len(ids) * longest)  # if all were that long

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert curve == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert not list((tmp_path / "b").glob("events*"))


@pytest.mark.usefixtures("on_cpu")
def test_a_layout_that_is_wrong_is_found_at_the_first_batch(
    tmp_path, groups_file, backbone, monkeypatch
):
    monkeypatch.setattr(attention, "_later", lambda rows, _: torch.zeros(rows, rows))
    with pytest.raises(LayoutError, match=r"they differ by 0\.\d+ .* set layout=separate"):
        run(groups_file, backbone, tmp_path / "a")
    run(groups_file, backbone, tmp_path / "b", layout="separate", max_steps=1)


@pytest.mark.usefixtures("on_cpu")
def test_what_rounding_does_to_separate_sequences_too_is_no_fault_of_a_layout(
    tmp_path, groups_file, backbone, monkeypatch
):
    monkeypatch.setattr(step, "ALLOWED", 0.0)  # as with weights that blow rounding up
    run(groups_file, backbone, tmp_path / "a", max_steps=1)
    monkeypatch.setattr(attention, "_later", lambda rows, _: torch.zeros(rows, rows))
    with pytest.raises(LayoutError, match="set layout=separate"):
        run(groups_file, backbone, tmp_path / "b")


def test_the_first_batch_is_checked_at_its_shortest_and_its_longest(
    tmp_path, groups_file, backbone, monkeypatch
):
    real, seen = step.difference, []
    monkeypatch.setattr(step, "difference", lambda *args: seen.append(args[2]) or real(*args))
    run(groups_file, backbone, tmp_path / "a", max_steps=1)
    ids, _ = tokenise([groups_file], RewardModel.start(backbone, wrapper="pretrain").template)
    first = loop.batches(ids.lengths(), 16, seed=0, epoch=0)[0]
    lengths = [len(prefix) + max(map(len, own)) for prefix, own in seen[0]]
    assert sorted(lengths) == [min(ids.lengths()[first]), max(ids.lengths()[first])]
    assert lengths[0] != lengths[1]


@pytest.mark.slow
def test_a_folder_has_one_trainer_and_a_killed_one_lets_go(tmp_path, groups_file, backbone):
    holder = (
        "import sys, time; from pathlib import Path; from trainer.resume import only_trainer\n"
        "with only_trainer(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(out)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ResumeError, match="another trainer is writing there"):
        run(groups_file, backbone, out, max_steps=1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert run(groups_file, backbone, out, max_steps=1)["steps"] == 1
    assert not list(out.glob("*lock*"))
    with resume.only_trainer(out), pytest.raises(ResumeError), resume.only_trainer(out):
        time.sleep(0)


def test_another_fault_of_the_same_kind_is_not_taken_for_a_second_trainer(tmp_path):
    with pytest.raises(BlockingIOError, match="the pipe"), resume.only_trainer(tmp_path / "out"):
        raise BlockingIOError(11, "the pipe is full")


def test_a_folder_in_use_is_not_emptied(tmp_path):
    out = tmp_path / "out"
    with resume.only_trainer(out):
        (out / "kept").mkdir()
        with pytest.raises(ResumeError, match="another trainer is writing there"):
            resume.emptied(out)
    assert (out / "kept").exists()
    resume.emptied(out)
    assert not list(out.iterdir())


def test_the_weights_to_start_from_are_not_written_over(tmp_path, groups_file, backbone):
    RewardModel.start(backbone, wrapper="pretrain").save(tmp_path / "start")
    kept = tmp_path / "start" / "resume" / "step-000000003"
    RewardModel.start(backbone, wrapper="pretrain").save(kept)
    for start in (tmp_path / "start", kept):
        with pytest.raises(ResumeError, match="would be lost; choose another folder"):
            run(groups_file, start, tmp_path / "start", max_steps=1)
    assert run(groups_file, kept, tmp_path / "out", max_steps=1)["steps"] == 1


def test_limits_beyond_the_positions_of_the_network_are_refused(tmp_path, groups_file, backbone):
    changes = {"max_length": 300, "max_response_length": 50}
    with pytest.raises(BadCheckpointError, match=r"max_length=300 .* 256 positions .*=64"):
        run(groups_file, backbone, tmp_path / "out", **changes)
    RewardModel.start(backbone, wrapper="sft").save(tmp_path / "c")
    record = json.loads((tmp_path / "c" / "polar.json").read_text())
    (tmp_path / "c" / "polar.json").write_text(json.dumps({**record, "max_length": 300}))
    with pytest.raises(BadCheckpointError, match="max_length=300"):
        RewardModel.load(tmp_path / "c")


def test_decoders_with_other_names_for_their_layers(tmp_path, groups_file, tokenizer):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    network.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    run(groups_file, tmp_path / "lm", tmp_path / "a", layout="separate", max_steps=2)
    items = [{"prompt": "p", "reference": "a b", "output": text} for text in ("a b", "c d e")]
    scores = Scorer.load(tmp_path / "a").score(items)
    alone = [Scorer.load(tmp_path / "a").score([item])[0] for item in items]
    assert scores == pytest.approx(alone, abs=1e-6)
    assert scores[0] != scores[1]


def test_an_official_folder_is_to_be_converted(tmp_path, groups_file):
    (tmp_path / "config.json").write_text('{"architectures": ["InternLM2ForRewardModel"]}')
    for attempt in (RewardModel.load, lambda path: run(groups_file, path, tmp_path / "out")):
        with pytest.raises(BadCheckpointError, match="python -m trainer convert"):
            attempt(tmp_path)


def test_ids_are_made_once_for_a_run_that_is_stopped(tmp_path, groups_file, backbone, monkeypatch):
    made = []
    real = ids_cache.tokenise
    monkeypatch.setattr(
        ids_cache, "tokenise", lambda *args, **kwargs: made.append(1) or real(*args, **kwargs)
    )
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(StoppedError):
            run(groups_file, backbone, tmp_path / "out", save_seconds=1e-9)
    run(groups_file, backbone, tmp_path / "out")
    assert made == [1]
    assert not (tmp_path / "out" / "resume").exists()


def test_a_shard_that_is_cut_off_is_named(tmp_path, backbone):
    whole, cut = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(make_groups(20), whole)
    cut.write_bytes(whole.read_bytes()[:-300])
    with pytest.raises(BadGroupsError, match=r"b\.parquet: not a readable Parquet file"):
        loop.train([whole, cut], backbone, tmp_path / "o", loop.TrainSettings(), stage="pretrain")


def test_a_backbone_needs_neither_pad_token_nor_free_special_tokens(tmp_path, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    assert bare.pad_token is None
    assert bare.eos_token is None
    network = tiny_llama(len(bare), tie_word_embeddings=True)
    network.config.pad_token_id = None
    network.save_pretrained(tmp_path / "lm")
    bare.save_pretrained(tmp_path / "lm")
    model = RewardModel.start(tmp_path / "lm", wrapper="sft")
    assert model.network.get_input_embeddings().weight.shape[0] == len(bare) + 3
    marks = {model.record.separator.id, model.record.reward.id}
    assert model.tokenizer.pad_token_id not in {None, *marks}
    pq.write_table(make_groups(20), tmp_path / "g.parquet")
    summary = run(tmp_path / "g.parquet", tmp_path / "lm", tmp_path / "out", max_steps=1)
    assert summary["pairs"] == 32
    RewardModel.load(tmp_path / "out")


def test_a_checkpoint_of_another_template_is_refused_with_the_difference(
    tmp_path, groups_file, backbone
):
    RewardModel.start(backbone, wrapper="sft").save(tmp_path / "c")
    record = json.loads((tmp_path / "c" / "polar.json").read_text())
    (tmp_path / "c" / "polar.json").write_text(json.dumps({**record, "template": "polar-2"}))
    with pytest.raises(BadCheckpointError, match=r"template: .*'polar-1', not 'polar-2'"):
        run(groups_file, tmp_path / "c", tmp_path / "out")
