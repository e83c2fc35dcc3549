"""Official checkpoints in and out: the same scores, the same ids, and back bit for bit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from tests.trainer.official import (
    CONFIG,
    REWARD_ID,
    SEPARATOR_ID,
    SPECIAL,
    score,
    sentencepiece_model,
    slow_ids,
    write_official,
)
from trainer.convert import convert
from trainer.errors import BadCheckpointError, TrainerError
from trainer.model import RewardModel, read_record
from trainer.template import Texts
from trainer.weights import Weights


@pytest.fixture(scope="module")
def model():
    return sentencepiece_model()


@pytest.fixture(scope="module")
def processor(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def official(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("official") / "POLAR"
    write_official(folder, model)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory, official):
    out = tmp_path_factory.mktemp("converted") / "llama"
    assert convert(official, out) == "LlamaForSequenceClassification"
    return out


@pytest.fixture(scope="module")
def tokenizer(converted):
    return AutoTokenizer.from_pretrained(converted)


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}


def tensors(folder):
    return {name: tensor.clone() for name, tensor in Weights(folder).items()}


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 1, "bias": True},
        {"rope_scaling": None},
    ],
    ids=["grouped", "one each", "one for all, biases", "no scaling"],
)
def test_scores_are_those_of_the_formulas_also_beyond_the_positions(tmp_path, model, changes):
    changes = {"max_position_embeddings": 24} | changes
    own = write_official(tmp_path / "in", model, **changes)
    convert(tmp_path / "in", tmp_path / "out")
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    rng = random.Random(0)
    found, wanted = [], []
    for length in (1, 5, 24, 25, 40, 70):
        ids = [1, *(rng.randrange(3, 92000) for _ in range(length - 1))]
        with torch.no_grad():
            found.append(network(torch.tensor([ids])).logits[0, 0].item())
        wanted.append(score(own, CONFIG | changes, ids).item())
    assert found == pytest.approx(wanted, abs=1e-4)
    assert max(wanted) - min(wanted) > 0.1


def test_the_result_is_a_plain_checkpoint(converted, official):
    config = AutoConfig.from_pretrained(converted)
    assert config.architectures == ["LlamaForSequenceClassification"]
    assert config.rope_parameters == {
        "rope_type": "dynamic",
        "rope_theta": CONFIG["rope_theta"],
        "factor": 2.0,
    }
    assert not hasattr(config, "auto_map")
    record = read_record(converted)
    assert (record.separator.token, record.separator.id) == ("<|reward|>", SEPARATOR_ID)
    assert (record.reward.token, record.reward.id) == ("[UNUSED_TOKEN_130]", REWARD_ID)
    assert (record.wrapper, record.stage) == ("sft", "finetune")
    assert (record.max_length, record.max_response_length) == (256, 64)
    RewardModel.load(converted)


@pytest.mark.parametrize(
    ("shards", "dtype"),
    [("", torch.float32), ("safetensors", torch.bfloat16), ("bin", torch.float16)],
)
def test_there_and_back_is_bit_equal_from_any_shards(tmp_path, model, shards, dtype):
    own = write_official(tmp_path / "in", model, dtype=dtype, shards=shards)
    seen = []
    convert(
        tmp_path / "in",
        tmp_path / "out",
        shard_bytes=20_000,
        progress=lambda done, total, note: seen.append((done, total)),
    )
    assert seen == [(i, 9 * 3 + 3) for i in range(1, 9 * 3 + 4)]
    there = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in there.values()} == {dtype}
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == dtype
    assert convert(tmp_path / "out", tmp_path / "back") == "InternLM2ForRewardModel"
    assert_same_tensors(tensors(tmp_path / "back"), own)
    small = {
        name: content
        for name, content in files(tmp_path / "in").items()
        if ".bin" not in name and ".safetensors" not in name
    }
    assert small.items() <= files(tmp_path / "back").items()
    convert(tmp_path / "back", tmp_path / "again")
    assert_same_tensors(tensors(tmp_path / "again"), there)
    for name in ("config.json", "polar.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_checkpoint_trained_further_goes_back_with_the_files_of_its_ancestor(
    tmp_path, converted, official
):
    child = RewardModel.load(converted)
    with torch.no_grad():
        child.network.score.weight.add_(1)
    child.save(tmp_path / "child")
    with pytest.raises(BadCheckpointError, match="--like"):
        convert(tmp_path / "child", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for number, like in enumerate((official, converted)):
        out = tmp_path / f"back{number}"
        convert(tmp_path / "child", out, like=like)
        changed, before = tensors(out), tensors(official)
        assert torch.equal(changed.pop("v_head.weight"), before.pop("v_head.weight") + 1)
        assert_same_tensors(changed, before)
        assert (out / "tokenizer.model").read_bytes() == (official / "tokenizer.model").read_bytes()
        assert (out / "modeling_internlm2.py").is_file()


PIECES = st.one_of(
    st.text(max_size=12),
    st.text(alphabet="ab -=\n\tT.é東🙂▁", max_size=12),
    st.sampled_from(
        [*SPECIAL.values(), "[UNUSED_TOKEN_130]", "[UNUSED_TOKEN_7]", "<0x41>", "aaaa", "   "]
    ),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PIECES, max_size=6).map("".join))
def test_ids_are_those_of_sentencepiece(tokenizer, processor, text):
    assert tokenizer(text)["input_ids"] == slow_ids(processor, text)


@settings(max_examples=40, deadline=None)
@given(st.lists(PIECES, max_size=6).map("".join))
def test_ids_decode_to_the_text(tokenizer, text):
    plain = text
    for token in [*SPECIAL.values(), "[UNUSED_TOKEN_130]"]:
        plain = plain.replace(token, "")
    ids = tokenizer(plain)["input_ids"]
    if REWARD_ID not in ids and not any(token in plain for token in SPECIAL.values()):
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded == plain.replace("▁", " ")


def test_a_model_that_puts_a_space_in_front_gives_the_same_ids(tmp_path):
    model = sentencepiece_model(dummy_prefix=True)
    write_official(tmp_path / "in", model)
    convert(tmp_path / "in", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    rng = random.Random(0)
    alphabet = [*"ab -=\n\téThe東🙂", "aaaa", "<|reward|>", "[UNUSED_TOKEN_7]x", "</s>"]
    for _ in range(200):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 12)))
        assert tokenizer(text)["input_ids"] == slow_ids(processor, text), repr(text)


@pytest.mark.parametrize("wrapper", ["sft", "pretrain"])
def test_sequences_are_what_the_official_client_and_a_server_make(converted, processor, wrapper):
    template = RewardModel.load(converted).template
    prompt, reference, answer = "How many planets?", "Eight. 東京", " eight\n\nplanets aaaa  "
    join = "\n" if wrapper == "sft" else ""
    official = f"{prompt}{join}{reference}<|reward|>{prompt}{join}{answer}[UNUSED_TOKEN_130]"
    ids = template.encode([Texts(prompt, reference, [answer], wrapper)])[0][0]
    assert ids == slow_ids(processor, official)
    assert (ids[0], ids[-1], ids.count(SEPARATOR_ID)) == (1, REWARD_ID, 1)


def spoil(folder, kind):
    """Damage an official folder in one way."""
    config = json.loads((folder / "config.json").read_text())
    if kind == "older tokenizer":  # of the reward models before POLAR
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["added_tokens_decoder"][str(REWARD_ID)] = {"content": "<|reward|>"}
        del settings["added_tokens_decoder"][str(SEPARATOR_ID)]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    elif kind == "no reward token":
        del config["reward_token_id"]
    elif kind == "yarn":
        config["rope_scaling"] = {"type": "yarn", "factor": 2.0}
    elif kind == "another kind":
        config |= {"model_type": "qwen2", "architectures": ["Qwen2ForRewardModel"]}
    elif kind == "no configuration":
        (folder / "config.json").unlink()
        return
    elif kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "cut off":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif kind == "a layer missing":
        config["num_hidden_layers"] = 4
    elif kind == "a layer too many":
        config["num_hidden_layers"] = 2
    elif kind == "not sentencepiece":
        (folder / "tokenizer.model").write_bytes(b"nothing of the kind")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("older tokenizer", "92527 and <|reward|> has id 92527; POLAR needs both"),
        ("no reward token", "reward_token_id is None"),
        ("yarn", "rope scaling 'yarn'"),
        ("another kind", "model type 'qwen2'"),
        ("no configuration", "config.json: not readable"),
        ("no weights", "no weights; expected one of"),
        ("cut off", "not a readable file of weights"),
        ("a layer missing", "weights missing: ['model.layers.3"),
        ("a layer too many", "not known: ['model.layers.2"),
        ("not sentencepiece", "not a readable SentencePiece model"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_and_nothing_written(tmp_path, model, kind, said):
    write_official(tmp_path / "in", model)
    spoil(tmp_path / "in", kind)
    with pytest.raises(BadCheckpointError) as fault:
        convert(tmp_path / "in", tmp_path / "out")
    assert said in str(fault.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_missing_shard_is_named(tmp_path, model):
    write_official(tmp_path / "in", model, shards="safetensors")
    (tmp_path / "in" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BadCheckpointError, match="model-00002-of-00003.safetensors missing"):
        convert(tmp_path / "in", tmp_path / "out")


def test_an_existing_folder_is_not_touched(tmp_path, official, converted):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(TrainerError, match="exists; choose another folder"):
        convert(official, tmp_path / "mine")
    assert files(tmp_path / "mine") == {"notes": b"keep"}


def test_the_files_of_another_tokenizer_are_refused(tmp_path, converted, official):
    other = tmp_path / "other"
    other.mkdir()
    for name, content in files(official).items():
        (other / name).write_bytes(content)
    config = json.loads((other / "config.json").read_text()) | {"reward_token_id": 92500}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpointError, match="trained with reward token 92527"):
        convert(converted, tmp_path / "out", like=other)


def test_weights_of_one_file_are_read_as_they_lie(official):
    assert_same_tensors(tensors(official), load_file(official / "model.safetensors"))


MEASURED = """
import sys, threading, time
from pathlib import Path
from trainer.convert import convert

def held():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

peak, over = 0, threading.Event()
def watch():
    global peak
    while not over.wait(0.005):
        peak = max(peak, held())

source, out, shard = sys.argv[1:]
before = held()
watcher = threading.Thread(target=watch)
watcher.start()
convert(Path(source), Path(out), shard_bytes=int(shard))
over.set()
watcher.join()
print(max(peak, held()) - before)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path, model):
    shapes = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 64}
    changes = {"num_attention_heads": 4, **shapes}
    own = write_official(tmp_path / "in", model, shards="safetensors", **changes)
    total = sum(tensor.nbytes for tensor in own.values())
    largest = max(tensor.nbytes for tensor in own.values())
    del own
    source, shard = tmp_path / "in", 50_000_000
    for name in ("out", "back"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(source), str(tmp_path / name), str(shard)],
            capture_output=True,
            text=True,
            check=True,
        )
        source = tmp_path / name
        assert 0 < int(done.stdout) < shard + 2 * largest < 0.3 * total
