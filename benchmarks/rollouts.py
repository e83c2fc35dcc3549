"""Our driver against a bare asynchronous client, on one running vLLM server.

    python -m benchmarks.rollouts [--weights FOLDER] [--prompts 200] [--rounds 5]

Same prompts, same concurrency, same bodies; the two take turns, and the medians of the rounds are
compared. Without weights a model of random ones is made (25 million parameters): how fast it is
does not depend on what it says. The last line is one JSON object; `ratio_vs_bare` is the bare
client's time over ours, 1 when the driver costs nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa

from pipelines import ids
from pipelines.engines import memory, wire
from pipelines.engines.choose import open_engine
from pipelines.engines.openai import OpenAIEngine
from pipelines.engines.options import VllmOptions
from pipelines.policies import Pool, PoolPolicy
from pipelines.rollouts import RolloutSettings, SamplingSettings, rollout

WORDS = "the river carries seven red boats past an old mill while birds answer from a far bank"


def random_model(folder: Path) -> Path:
    """A Llama of 25 million random parameters with a byte-level tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from trainer.language_model import train_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(train_tokenizer([WORDS], 320, folder, special=()))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
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
            "source": ["bench"] * count,
        }
    )


async def bare(url: str, bodies: list[dict[str, Any]], concurrency: int) -> int:
    """Send all bodies and add up the tokens: no seeds kept, no retries, nothing written."""
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(timeout=None, trust_env=False, limits=httpx.Limits()) as http:

        async def one(body: dict[str, Any]) -> int:
            async with gate:
                reply = await http.post(url, json=body)
            return reply.json()["usage"]["completion_tokens"]

        return sum(await asyncio.gather(*map(one, bodies)))


@contextmanager
def collected(bodies: list[dict[str, Any]]) -> Iterator[None]:
    """Collect what the driver sends."""
    make = wire.body

    def kept(*arguments: Any, **named: Any) -> dict[str, Any]:
        bodies.append(make(*arguments, **named))
        return bodies[-1]

    wire.body = kept
    try:
        yield
    finally:
        wire.body = make


def measure(weights: Path, arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    policy = PoolPolicy(name="bench", kind="base", engine="vllm", weights=str(weights))
    options = VllmOptions(
        concurrency=arguments.concurrency, dtype=arguments.dtype, arguments=("--seed=0",)
    )
    pool = Pool(source="bench", policies=(policy,), vllm=options)
    engine = open_engine(policy, pool, home, policy_id="bench")
    assert isinstance(engine, OpenAIEngine)
    settings = RolloutSettings(
        samples=arguments.samples, sampling=SamplingSettings(max_tokens=arguments.max_tokens)
    )
    row = {
        "policy_id": ids.content_id("policy", "bench"),
        "name": "bench",
        "template": "{prompt}",
        "licence": None,
    }
    prompts = prompts_table(arguments.prompts)
    bodies: list[dict[str, Any]] = []

    def ours(turn: int) -> None:
        made = rollout(row, prompts, engine, settings, home / f"staging{turn}", set())
        assert made.made == prompts.num_rows * arguments.samples, made.excluded.to_pylist()

    def theirs() -> int:
        assert engine.server is not None
        url = f"{engine.server.url}/v1/completions"
        return asyncio.run(bare(url, bodies, arguments.concurrency))

    times: dict[str, list[float]] = {"ours": [], "bare": []}
    try:
        with collected(bodies):
            ours(-1)  # starts the server and warms it up
        bodies = [body | engine.endpoint.extra for body in bodies]
        tokens = theirs()
        for turn in range(arguments.rounds):
            work = [("ours", lambda turn=turn: ours(turn)), ("bare", theirs)]
            for name, call in work if turn % 2 else reversed(work):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
            said = ", ".join(f"{name} {found[-1]:.2f} s" for name, found in times.items())
            print(f"round {turn + 1}: {said}", flush=True)
    finally:
        engine.close()
    seconds = {name: statistics.median(found) for name, found in times.items()}
    ratios = [b / o for o, b in zip(times["ours"], times["bare"], strict=True)]
    return {
        "ratio_vs_bare": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "seconds_ours": round(seconds["ours"], 3),
        "seconds_bare": round(seconds["bare"], 3),
        "tokens_per_second": round(tokens / seconds["ours"]),
        "requests": len(bodies),
        "samples": arguments.samples,
        "concurrency": arguments.concurrency,
        "weight_gib": round(memory.weight_bytes(weights, arguments.dtype) / memory.GIB, 3),
        "engine": engine.version,
        "rounds": arguments.rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = arguments.weights or random_model(Path(folder) / "model")
        print(json.dumps(measure(weights, arguments, Path(folder))))


if __name__ == "__main__":
    main()
