"""What a corpus will cost, before anything runs: trajectories, tokens, GPU-hours, money, disk.

Arithmetic over a pool and its prompts; every assumption is a named setting that can be given
another value. Nothing is measured here and nothing is promised: the figures say which order of
magnitude to expect, and how they change.

A policy of P parameters makes `gpu_flops * utilisation / (2 * P)` tokens a second on each GPU that
holds a copy's share: about 2 P operations a token (Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from pipelines.policies import PoolPolicy
from pipelines.rollouts import RolloutSettings, answers
from pipelines.settings import Settings

UNITS = ((1e9, "B"), (1e6, "M"))
SUMS = (
    "policies",
    "trajectories",
    "answer_tokens",
    "prompt_tokens",
    "gpu_hours",
    "money",
    "weights_bytes",
)


class PlanSettings(Settings):
    """The assumptions of a plan: the section `plan`, or `--assume NAME=VALUE`."""

    prefix_answer_tokens: float = Field(
        default=1000, gt=0, description="mean tokens of a continuation, below the sampling's limit"
    )
    instruction_answer_tokens: float = Field(
        default=400, gt=0, description="mean tokens of an answer to an instruction"
    )
    prompt_tokens: float = Field(default=512, gt=0, description="mean tokens of a prompt")
    gpu: str = "H100 80 GB"
    gpu_flops: float = Field(default=989e12, gt=0, description="peak, bf16 without sparsity")
    gpu_memory: float = Field(default=80e9, gt=0, description="bytes of one GPU")
    utilisation: float = Field(default=0.1, gt=0, le=1, description="share of the peak, decoding")
    prefill_utilisation: float = Field(default=0.4, gt=0, le=1, description="reading prompts")
    memory_share: float = Field(
        default=0.6, gt=0, le=1, description="of a GPU's memory for weights; the rest is for keys"
    )
    bytes_per_parameter: float = Field(default=2.0, gt=0, description="bf16")
    start_minutes: float = Field(default=5.0, ge=0, description="to load a policy, on all its GPUs")
    gpu_hour: float = Field(default=2.5, ge=0, description="money for one GPU for one hour")
    api_input: float = Field(default=0.5, ge=0, description="money for a million prompt tokens")
    api_output: float = Field(default=2.0, ge=0, description="money for a million answer tokens")
    currency: str = "USD"
    characters_per_token: float = Field(default=4.0, gt=0)
    compression: float = Field(default=0.45, gt=0, le=1, description="of text in Parquet, zstd")
    row_bytes: float = Field(default=220, ge=0, description="of a trajectory beside its text")
    signature_bytes: float = Field(default=528, ge=0, description="of a trajectory's signature")
    pair_bytes: float = Field(default=30, ge=0, description="of a pair")


def plan_corpus(
    policies: Sequence[PoolPolicy],
    prompts: Mapping[str, int],
    rollouts: RolloutSettings,
    assume: PlanSettings,
    sizes: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The plan of a pool's rollouts, as plain JSON.

    Args:
        policies: of the pool.
        prompts: how many there are of each kind (`prefix`, `instruction`).
        rollouts: assignment, samples and sampling.
        assume: the assumptions.
        sizes: parameters by policy name where the pool file gives none; else the name tells
            (`Qwen2.5-7B`), else it is unknown and costs no GPU-hours, which is said.

    Returns:
        `sizes` (one line for each size of model and engine, smallest first; those of the engine
        `local` run on this machine's processors and cost no GPU-hours), `total`, `disk` in bytes,
        `unknown` (names of policies of unknown size), `assumptions`.
    """
    kinds = {p.name: answers({"kind": p.kind, "template": p.template}) for p in policies}
    lines: dict[tuple[float, str], dict[str, Any]] = {}
    unknown: list[str] = []
    pairs = 0.0
    for kind, count in prompts.items():
        able = [p for p in policies if kinds[p.name] == kind]
        if not able:
            continue
        asked = len(able)
        if rollouts.assignment == "sparse":
            asked = min(rollouts.policies_per_prompt, asked)
        made = asked * rollouts.samples
        pairs += count * made * (made - 1) / 2
        mean = assume.prefix_answer_tokens if kind == "prefix" else assume.instruction_answer_tokens
        tokens = min(mean, rollouts.sampling.max_tokens)
        for policy in able:
            share = count * asked / len(able)
            size = policy.parameters or (sizes or {}).get(policy.name) or size_of(policy)
            if size is None and policy.engine == "vllm":
                unknown.append(policy.name)
            line = lines.setdefault(
                (math.inf if policy.engine == "openai" else size or 0.0, policy.engine),
                dict.fromkeys(SUMS, 0.0),
            )
            _add(line, policy, share, share * rollouts.samples, tokens, size, assume)
    rows = [
        {
            "size": "endpoints" if engine == "openai" else spoken(size),
            "engine": engine,
            "gpus_each": gpus_for(size, assume) if engine == "vllm" and size else 0,
            **row,
        }
        for (size, engine), row in sorted(lines.items())
    ]
    total = {name: sum(row[name] for row in rows) for name in SUMS}
    text = total["answer_tokens"] * assume.characters_per_token * assume.compression
    made = total["trajectories"]
    disk = {
        "trajectories": text + made * assume.row_bytes,
        "signatures": made * assume.signature_bytes,
        "pairs": pairs * assume.pair_bytes,
        "weights": total.pop("weights_bytes"),
    }
    total = {name: round(value, 2) for name, value in total.items()}
    return {
        "sizes": [
            {n: round(v, 2) if isinstance(v, float) else v for n, v in row.items()} for row in rows
        ],
        "total": {**total, "pairs_possible": round(pairs), "disk_bytes": round(sum(disk.values()))},
        "disk": {name: round(value) for name, value in disk.items()},
        "unknown": sorted(set(unknown)),
        "assumptions": assume.model_dump(),
    }


def _add(
    line: dict[str, Any],
    policy: PoolPolicy,
    prompts: float,
    trajectories: float,
    tokens: float,
    size: float | None,
    assume: PlanSettings,
) -> None:
    """One policy's part; its prompt is read once for all samples."""
    answer, prompt = trajectories * tokens, prompts * assume.prompt_tokens
    line["policies"] += 1
    line["trajectories"] += trajectories
    line["answer_tokens"] += answer
    line["prompt_tokens"] += prompt
    if policy.engine == "openai":
        line["money"] += (prompt * assume.api_input + answer * assume.api_output) / 1e6
    elif size is not None and policy.engine == "vllm":
        operations = 2 * size * (answer / assume.utilisation + prompt / assume.prefill_utilisation)
        starting = gpus_for(size, assume) * assume.start_minutes / 60
        hours = operations / assume.gpu_flops / 3600 + starting
        line["gpu_hours"] += hours
        line["money"] += hours * assume.gpu_hour
    if size is not None and policy.engine != "openai":
        line["weights_bytes"] += size * assume.bytes_per_parameter


def gpus_for(size: float, assume: PlanSettings) -> int:
    """GPUs that hold one copy of a model: a power of two, as tensor parallelism wants it."""
    room = assume.gpu_memory * assume.memory_share
    return int(2 ** math.ceil(math.log2(max(size * assume.bytes_per_parameter / room, 1))))


def size_of(policy: PoolPolicy) -> float | None:
    """Parameters as a model's name tells them.

    >>> size_of(PoolPolicy(name="q", kind="base", weights="Qwen/Qwen2.5-0.5B"))
    500000000.0
    """
    for name in (policy.weights, policy.name):
        if found := re.findall(r"(?<![\w.])(\d+(?:[._]\d+)?)([bBmM])(?![a-zA-Z])", name):
            number, unit = found[0]
            return float(number.replace("_", ".")) * (1e9 if unit in "bB" else 1e6)
    return None


def spoken(size: float) -> str:
    """A number of parameters as people say it: 0.5 B, 70 B, 160 M; `unknown` for 0."""
    for unit, name in UNITS:
        if size >= unit / 2:
            return f"{size / unit:.3g} {name}"
    return f"{size:,.0f}" if size else "unknown"
