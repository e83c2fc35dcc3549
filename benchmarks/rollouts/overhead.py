"""Our driver against a bare client on the same running server, and against `LLM.generate`.

Same prompts, bodies and number of sequences under way. The three take turns: what does not run is
idle.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.rollouts import workload
from pipelines.engines import memory, vllm_server, wire
from pipelines.engines.openai import OpenAIEngine
from pipelines.engines.options import VllmOptions
from pipelines.rollouts import RolloutSettings, SamplingSettings, rollout


class Turn(NamedTuple):
    """One run through all requests; tokens as the model drew them, those that end a text too."""

    seconds: float
    prompt_tokens: int
    tokens: int


async def bare(url: str, bodies: list[dict[str, Any]], concurrency: int) -> tuple[int, int]:
    """Send all bodies and add up the tokens: no seeds kept, no retries, nothing written."""
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(timeout=None, trust_env=False, limits=httpx.Limits()) as http:

        async def one(body: dict[str, Any]) -> tuple[int, int]:
            async with gate:
                reply = await http.post(url, json=body)
            usage = reply.json()["usage"]
            return usage["prompt_tokens"], usage["completion_tokens"]

        asked, drawn = zip(*await asyncio.gather(*map(one, bodies)), strict=True)
        return sum(asked), sum(drawn)


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


@contextmanager
def in_process(settings: dict[str, Any], options: VllmOptions, home: Path) -> Iterator[Any]:
    """A function that has `LLM.generate` make all answers once."""
    file = home / "inprocess.json"
    file.write_text(json.dumps(settings))
    script = Path(__file__).with_name("inprocess_peer.py")
    with (home / "inprocess.log").open("wb") as log:
        peer = subprocess.Popen(
            [str(vllm_server.interpreter()), str(script), str(file)],
            env=vllm_server.environment(options, offline=True),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    with peer:  # closes its input at the end, which ends it, and waits
        assert peer.stdin
        assert peer.stdout
        assert peer.stdout.readline(), f"LLM did not start; see {log.name}"

        def generate() -> Turn:
            print("go", file=peer.stdin, flush=True)
            return Turn(**json.loads(peer.stdout.readline()))

        yield generate


def measure(weights: Path, arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    sequences = arguments.concurrency * arguments.samples
    options = VllmOptions(
        concurrency=arguments.concurrency,
        samples_per_request=arguments.samples,
        dtype=arguments.dtype,
        max_model_len=workload.CONTEXT,
        arguments=("--seed=0", f"--max-num-seqs={sequences}"),
    )
    engine = workload.engine_of("bench", weights, options, home)
    llm = {
        "model": str(weights.absolute()),
        "dtype": arguments.dtype,
        "max_model_len": workload.CONTEXT,
        "max_num_seqs": sequences,
        "enforce_eager": not memory.on_gpu(options),
        "seed": 0,
    }
    turns = _race(engine, llm, options, arguments, home)
    seconds = {name: [turn.seconds for turn in made] for name, made in turns.items()}
    ratios = {
        name: [a / b for a, b in zip(seconds[name], seconds["ours"], strict=True)]
        for name in ("bare", "inprocess")
    }
    return {
        **{f"ratio_vs_{name}": round(statistics.median(r), 3) for name, r in ratios.items()},
        **{f"ratios_vs_{name}": [round(one, 3) for one in r] for name, r in ratios.items()},
        "seconds": {name: round(statistics.median(s), 3) for name, s in seconds.items()},
        "tokens": {name: statistics.median(t.tokens for t in made) for name, made in turns.items()},
        "requests": arguments.prompts,
        "samples": arguments.samples,
        "max_tokens": arguments.max_tokens,
        "concurrency": arguments.concurrency,
        "dtype": arguments.dtype,
        "weight_gib": round(memory.weight_bytes(weights, arguments.dtype) / memory.GIB, 3),
        "engine": engine.version,
        "rounds": arguments.rounds,
    }


def _race(
    engine: OpenAIEngine,
    llm: dict[str, Any],
    options: VllmOptions,
    arguments: argparse.Namespace,
    home: Path,
) -> dict[str, list[Turn]]:
    """Everyone's turns, after a warm-up of each."""
    prompts = workload.prompts_table(arguments.prompts)
    settings = RolloutSettings(
        samples=arguments.samples, sampling=SamplingSettings(max_tokens=arguments.max_tokens)
    )
    bodies: list[dict[str, Any]] = []

    def ours() -> Turn:
        staging = home / f"staging{time.monotonic_ns()}"
        start = time.perf_counter()
        made = rollout(workload.policy_row("bench"), prompts, engine, settings, staging, set())
        seconds = time.perf_counter() - start
        assert made.made == prompts.num_rows * arguments.samples, made.excluded.to_pylist()
        rows = pq.read_table(made.files, columns=["tokens", "finish_reason"])
        stops = pc.sum(pc.equal(rows["finish_reason"], "stop")).as_py()
        return Turn(seconds, 0, pc.sum(rows["tokens"]).as_py() + stops)

    def theirs() -> Turn:
        assert engine.server
        url = f"{engine.server.url}/v1/completions"
        start = time.perf_counter()
        tokens = asyncio.run(bare(url, bodies, arguments.concurrency))
        return Turn(time.perf_counter() - start, *tokens)

    try:
        with collected(bodies):
            ours()  # starts the server
        bodies = [body | engine.endpoint.extra for body in bodies]
        with in_process({"llm": llm, "bodies": bodies}, options, home) as generate:
            contenders: dict[str, Callable[[], Turn]]
            contenders = {"ours": ours, "bare": theirs, "inprocess": generate}
            asked = {theirs().prompt_tokens, generate().prompt_tokens}
            assert len(asked) == 1, f"prompts of {asked} tokens are not the same prompts"
            turns: dict[str, list[Turn]] = {name: [] for name in contenders}
            for number in range(arguments.rounds):
                first = number % len(contenders)
                for name in [*contenders, *contenders][first : first + len(contenders)]:
                    turns[name].append(contenders[name]())
                said = ", ".join(f"{name} {made[-1].seconds:.2f} s" for name, made in turns.items())
                print(f"round {number + 1}: {said}", flush=True)
    finally:
        engine.close()
    return turns
