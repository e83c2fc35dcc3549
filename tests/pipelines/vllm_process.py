"""A rollout over real vLLM; run as a program, to be killed: weights, home, log file.

Each request that is sent becomes a line of the log.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.engines import choose, wire
from pipelines.engines.openai import OpenAIEngine
from pipelines.engines.options import VllmOptions
from pipelines.policies import Pool, PoolPolicy
from pipelines.rollouts import RolloutSettings, SamplingSettings, rollout
from tests.pipelines import tiny_policy

PROMPTS = 2000
CONCURRENCY = 32
SETTINGS = RolloutSettings(samples=1, batch_size=100, sampling=SamplingSettings(max_tokens=16))
OPTIONS = VllmOptions(
    device="cpu", dtype="float32", kv_cache_gib=1, concurrency=CONCURRENCY, request_timeout=30
)


def engine(weights: Path, home: Path) -> OpenAIEngine:
    """The engine as a pool file would have it; nothing is started yet."""
    policy = PoolPolicy(name="tiny", kind="base", engine="vllm", weights=str(weights))
    pool = Pool(source="tiny", policies=(policy,), vllm=OPTIONS)
    made = choose.open_engine(policy, pool, home, policy_id="tiny")
    assert isinstance(made, OpenAIEngine)
    return made


@contextmanager
def logged(log: Path) -> Iterator[None]:
    """Write down each request that is sent meanwhile."""
    body = wire.body

    def written(model, prompt, *more, **named):
        with log.open("a") as file:
            file.write(f"{prompt}\n")
        return body(model, prompt, *more, **named)

    wire.body = written
    try:
        yield
    finally:
        wire.body = body


def run(asked: OpenAIEngine, home: Path, log: Path, progress=None):
    """All prompts of the tiny world."""
    prompts = tiny_policy.prompts_table(tiny_policy.texts(PROMPTS))
    policy = tiny_policy.policy()
    with logged(log):
        return rollout(policy, prompts, asked, SETTINGS, home / "staging", set(), progress=progress)


if __name__ == "__main__":
    weights, home, log = map(Path, sys.argv[1:4])
    asked = engine(weights, home)
    try:
        run(asked, home, log)
    finally:
        asked.close()
