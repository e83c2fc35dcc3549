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
from transformers import PreTrainedTokenizerFast

from tests.trainer.conftest import make_groups, tiny_llama
from tests.trainer.test_loop import losses, run
from trainer import attention, loop, resume
from trainer.errors import BadCheckpointError, BadGroupsError, LayoutError, ResumeError
from trainer.metrics import Work
from trainer.model import RewardModel
from trainer.packing import tokenise


def test_order_and_checkpointing_do_not_matter(tmp_path, groups_file, backbone, monkeypatch):
    plain = run(groups_file, backbone, tmp_path / "a", max_steps=4)
    lean = run(groups_file, backbone, tmp_path / "b", max_steps=4, checkpointing=True)
    assert losses(lean) == pytest.approx(losses(plain), rel=1e-6)
    real = loop.batches

    def backwards(*args, **kwargs):
        return [batch[::-1] for batch in real(*args, **kwargs)]

    monkeypatch.setattr(loop, "batches", backwards)
    other = run(groups_file, backbone, tmp_path / "c", max_steps=4)
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)


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
    padded = run(groups_file, backbone, tmp_path / "b", layout="separate", max_steps=2)
    assert all(0.05 < line["padding"] < 0.6 for line in padded["curve"])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert curve == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert not list((tmp_path / "b").glob("events*"))


def test_a_layout_that_is_wrong_is_found_at_the_first_batch(
    tmp_path, groups_file, backbone, monkeypatch
):
    monkeypatch.setattr(attention, "_later", lambda rows, _: torch.zeros(rows, rows))
    with pytest.raises(LayoutError, match=r"they differ by 0\.\d+ .* set layout=separate"):
        run(groups_file, backbone, tmp_path / "a")
    run(groups_file, backbone, tmp_path / "b", layout="separate", max_steps=1)


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
