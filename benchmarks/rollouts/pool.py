"""A pool of tiny policies, each behind a server of its own: what starting the servers costs.

The policies are asked one after the other, as a run does it; then the same with the next server
started while the current one answers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.rollouts import workload
from pipelines.engines.openai import OpenAIEngine
from pipelines.engines.options import VllmOptions
from pipelines.rollouts import RolloutSettings, SamplingSettings, rollout

SETTINGS = RolloutSettings(samples=2, sampling=SamplingSettings(max_tokens=64))


class Pass(NamedTuple):
    """Once through the pool."""

    seconds: float
    waiting: float  # for servers, with nothing else to do
    starts: list[float]  # of each server, from its process until it is healthy


def start(engine: OpenAIEngine) -> float:
    assert engine.server
    began = time.perf_counter()
    engine.server.start()
    return time.perf_counter() - began


def run(engines: dict[str, OpenAIEngine], prompts: int, staging: Path, *, ahead: bool) -> Pass:
    """Ask every policy; `ahead` starts the next server when this one's answers begin."""
    table = workload.prompts_table(prompts)
    left = list(engines.values())
    waiting, starts = 0.0, []
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as starter:
        try:
            starting = starter.submit(start, left.pop(0))
            for name, engine in engines.items():
                since = time.perf_counter()
                starts.append(starting.result())
                waiting += time.perf_counter() - since
                if ahead and left:
                    starting = starter.submit(start, left.pop(0))
                made = rollout(workload.policy_row(name), table, engine, SETTINGS, staging, set())
                assert made.made == prompts * SETTINGS.samples, made.excluded.to_pylist()
                engine.close()
                if not ahead and left:
                    starting = starter.submit(start, left.pop(0))
        finally:
            for engine in engines.values():
                assert engine.server
                engine.server.give_up()
                engine.close()
    return Pass(time.perf_counter() - began, waiting, starts)


def measure(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    weights = {
        f"tiny{n}": workload.random_llama(
            home / "policies" / f"tiny{n}", width=128, layers=5, heads=4, seed=n
        )
        for n in range(arguments.policies)
    }
    options = VllmOptions(max_model_len=workload.CONTEXT, kv_cache_gib=1)
    passes: dict[bool, list[Pass]] = {False: [], True: []}
    for number in range(arguments.pool_rounds):
        for ahead in (False, True) if number % 2 == 0 else (True, False):
            engines = {n: workload.engine_of(n, w, options, home) for n, w in weights.items()}
            staging = home / f"staging-{ahead}{number}"
            made = run(engines, arguments.pool_prompts, staging, ahead=ahead)
            passes[ahead].append(made)
            how = "the next server started ahead" if ahead else "one server after the other"
            print(f"pool, {how}: {made.seconds:.1f} s, {made.waiting:.1f} waiting", flush=True)
    in_turn, ahead = (_medians(passes[which]) for which in (False, True))
    saved = in_turn["seconds"] - ahead["seconds"]
    return {
        "policies": arguments.policies,
        "prompts": arguments.pool_prompts,
        "samples": SETTINGS.samples,
        "max_tokens": SETTINGS.sampling.max_tokens,
        "in_turn": in_turn,
        "ahead": ahead,
        "share_starting": round(in_turn["waiting"] / in_turn["seconds"], 3),
        "seconds_saved": round(saved, 2),
        "share_saved": round(saved / in_turn["seconds"], 3),
        "rounds": arguments.pool_rounds,
    }


def _medians(passes: list[Pass]) -> dict[str, float]:
    """Of the passes; of a start, over all servers of all passes."""
    return {
        "seconds": round(statistics.median(one.seconds for one in passes), 2),
        "waiting": round(statistics.median(one.waiting for one in passes), 2),
        "start": round(statistics.median(s for one in passes for s in one.starts), 2),
    }
