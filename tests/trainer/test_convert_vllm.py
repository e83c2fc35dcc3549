"""Conversion against vLLM's own InternLM2 reward model, in the environment of `make vllm`."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch

from tests.trainer.official import CONFIG, sentencepiece_model, write_official
from trainer.convert import convert
from trainer.model import RewardModel

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("vllm_scores.py")
pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter of the vLLM environment."""
    path = Path(os.environ.get("POLAR_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
    if not path.is_file():
        pytest.skip(f"{path} is missing: run `make vllm`, or set POLAR_VLLM_PYTHON")
    return str(path)


def vllm_scores(python: str, folder: Path, task: str, sequences: list[list[int]]) -> list[float]:
    asked, out = folder.with_suffix(".ids.json"), folder.with_suffix(".scores.json")
    asked.write_text(json.dumps(sequences))
    done = subprocess.run(
        [python, str(PROGRAM), *map(str, (folder, task, asked, out))],
        capture_output=True,
        text=True,
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        check=False,
    )
    assert out.is_file(), done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("heads", [2, 4], ids=lambda heads: f"{heads} key-value heads of 4")
def test_scores_are_those_of_vllms_internlm2_reward_model(tmp_path, python, heads):
    changes = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": heads,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
    }
    official, plain = tmp_path / "official", tmp_path / "plain"
    write_official(official, sentencepiece_model(), **changes)
    convert(official, plain)
    network = RewardModel.load(plain).network.eval()
    rng = random.Random(heads)
    lengths = (1, 2, 17, 100, CONFIG["max_position_embeddings"] - 1)
    sequences = [[1, *(rng.randrange(3, 92000) for _ in range(n - 1))] for n in lengths]
    with torch.no_grad():
        ours = [network(torch.tensor([ids])).logits.item() for ids in sequences]
    assert max(ours) - min(ours) > 0.5

    # Its configuration class is code of the official folder, so vLLM gets Llama's: the same fields.
    config = json.loads((official / "config.json").read_text())
    del config["auto_map"]
    (official / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    theirs = vllm_scores(python, official, "token_classify", sequences)
    assert theirs == pytest.approx(ours, abs=1e-4)
    if heads == 2:  # and the plain folder as vLLM serves it, without any remote code
        served = vllm_scores(python, plain, "classify", sequences)
        assert served == pytest.approx(ours, abs=1e-4)
