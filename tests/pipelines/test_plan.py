"""Plans: the two public pools load and hold, and the arithmetic follows its assumptions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines import policies as pool_policies
from pipelines.plan import PlanSettings, gpus_for, plan_corpus, size_of, spoken
from pipelines.policies import PoolPolicy, load_pool
from pipelines.rollouts import RolloutSettings

CONFIGS = Path(__file__).parents[2] / "configs"
ASSUME = PlanSettings()


@pytest.mark.parametrize(
    ("name", "kinds", "families_held_out"),
    [
        ("pool.paper.yaml", {"base": 53, "chat": 53}, {"chatglm", "deepseek", "gemma"}),
        ("pool.small.yaml", {"base": 10, "chat": 5}, {"bloom", "gpt2"}),
    ],
)
def test_a_public_pool_holds(name: str, kinds: dict[str, int], families_held_out: set[str]):
    pool = load_pool(CONFIGS / name)
    assert Counter(policy.kind for policy in pool.policies) == kinds
    assert len({policy.name for policy in pool.policies}) == len(pool.policies)
    assert len({(p.weights, p.revision) for p in pool.policies}) == len(pool.policies)
    sides: dict[str, set[str | None]] = {}
    for policy in pool.policies:
        sides.setdefault(policy.family, set()).add(policy.split)
        assert policy.on_hub
        assert policy.weights.count("/") == 1
        assert policy.parameters
        assert policy.licence == "unverified" or policy.licence_source
    assert all(len(side) == 1 for side in sides.values())  # no relative of one held out is seen
    assert {family for family, side in sides.items() if side == {"test"}} == families_held_out
    named = {policy.name: policy for policy in pool.policies}
    steps = Counter((policy.policy_group, policy.lineage_step) for policy in pool.policies)
    assert max(steps.values()) == 1  # siblings can be told apart
    for policy in pool.policies:
        if policy.parent:
            assert named[policy.parent].policy_group == policy.policy_group
            assert named[policy.parent].lineage_step < policy.lineage_step


def test_the_small_pool_is_small_and_has_several_revisions_of_one_model():
    pool = load_pool(CONFIGS / "pool.small.yaml")
    assert max(policy.parameters or 0 for policy in pool.policies) < 1e9
    models = Counter(policy.weights for policy in pool.policies)
    assert len(models) == 12
    assert models["EleutherAI/pythia-160m"] == 4


def test_the_sizes_that_pool_files_say_are_those_that_names_say():
    for name in ("pool.paper.yaml", "pool.small.yaml"):
        for policy in load_pool(CONFIGS / name).policies:
            told = size_of(policy)
            if told and policy.parameters:
                assert policy.parameters == pytest.approx(told, rel=0.3), policy.name


def policy(name: str, **more: Any) -> PoolPolicy:
    said = {"name": name, "kind": "base", "engine": "vllm", "weights": name, "revision": "main"}
    return PoolPolicy.model_validate(said | more)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Qwen/Qwen2.5-0.5B", 5e8),
        ("internlm/internlm2_5-1_8b", 1.8e9),
        ("EleutherAI/pythia-160m", 1.6e8),
        ("meta-llama/Meta-Llama-3-70B-Instruct", 7e10),
        ("openai-community/gpt2", None),
        ("org/8bit-model", None),
    ],
)
def test_sizes_in_names(name: str, size: float | None):
    assert size_of(policy(name)) == size


def test_every_trajectory_of_a_dense_plan_is_counted():
    pool = [policy("a-1B"), policy("b-1B"), policy("c-7B", kind="chat")]
    rollouts = RolloutSettings(assignment="dense", samples=3)
    made = plan_corpus(pool, {"prefix": 100, "instruction": 10}, rollouts, ASSUME)
    assert made["total"]["trajectories"] == 3 * (2 * 100 + 10)
    assert made["total"]["answer_tokens"] == 3 * (200 * 1000 + 10 * 400)
    assert made["total"]["pairs_possible"] == 100 * 15 + 10 * 3
    assert [(row["size"], row["policies"]) for row in made["sizes"]] == [("1 B", 2), ("7 B", 1)]
    assert made == json.loads(json.dumps(made))


def test_a_sparse_plan_asks_as_many_as_it_says():
    pool = [policy(f"p{n}-1B") for n in range(10)]
    made = plan_corpus(pool, {"prefix": 1000}, RolloutSettings(samples=3), ASSUME)
    assert made["total"]["trajectories"] == pytest.approx(1000 * 2 * 3)
    alone = plan_corpus(pool[:1], {"prefix": 1000}, RolloutSettings(samples=3), ASSUME)
    assert alone["total"]["trajectories"] == 3000


def test_hours_and_money_by_hand():
    assume = PlanSettings(
        gpu_flops=1e15, utilisation=0.1, prefill_utilisation=0.5, start_minutes=0, gpu_hour=2,
        prefix_answer_tokens=1000, prompt_tokens=500,
    )  # fmt: skip
    rollouts = RolloutSettings(assignment="dense", samples=2)
    made = plan_corpus([policy("x", parameters=5e9)], {"prefix": 36_000}, rollouts, assume)
    decode = 2 * 5e9 * 72e6 / 1e14  # 72 M tokens at 10,000 a second
    prefill = 2 * 5e9 * 18e6 / 5e14
    assert made["total"]["gpu_hours"] == pytest.approx((decode + prefill) / 3600, abs=0.01)
    assert made["total"]["money"] == pytest.approx(2 * (decode + prefill) / 3600, abs=0.01)
    twice = plan_corpus([policy("x", parameters=1e10)], {"prefix": 36_000}, rollouts, assume)
    assert twice["total"]["gpu_hours"] == pytest.approx(2 * made["total"]["gpu_hours"], abs=0.02)
    assert made["disk"]["weights"] == 10_000_000_000


def test_short_limits_bind_and_what_has_no_size_is_named():
    rollouts = RolloutSettings.model_validate({"samples": 1, "sampling": {"max_tokens": 10}})
    made = plan_corpus([policy("mystery")], {"prefix": 100}, rollouts, ASSUME)
    assert made["total"]["answer_tokens"] == 1000
    assert (made["unknown"], made["total"]["gpu_hours"]) == (["mystery"], 0)
    known = plan_corpus([policy("mystery")], {"prefix": 100}, rollouts, ASSUME, {"mystery": 1e6})
    assert known["unknown"] == []


def test_endpoints_cost_by_the_token():
    pool = [policy("vendor", kind="api", engine="openai")]
    made = plan_corpus(pool, {"instruction": 1000}, RolloutSettings(samples=2), ASSUME)
    assert made["total"]["money"] == pytest.approx((512_000 * 0.5 + 800_000 * 2) / 1e6, abs=0.01)
    assert (made["total"]["gpu_hours"], made["sizes"][0]["size"]) == (0, "endpoints")


def test_nothing_to_ask_costs_nothing():
    made = plan_corpus([policy("a-1B")], {"instruction": 100}, RolloutSettings(), ASSUME)
    assert (made["sizes"], set(made["total"].values())) == ([], {0})
    assert "gpu_hours" in made["total"]


def test_models_are_spread_over_enough_gpus():
    assert [gpus_for(size, ASSUME) for size in (1e8, 7e9, 32e9, 72e9)] == [1, 1, 2, 4]
    assert [spoken(size) for size in (1.6e8, 5e8, 7.04e10, 0)] == [
        "160 M",
        "0.5 B",
        "70.4 B",
        "unknown",
    ]


def test_the_policy_model_names_where_a_licence_is_said():
    assert pool_policies.UNVERIFIED == "unverified"
    assert policy("a", licence="MIT", licence_source="https://a").licence_source == "https://a"


def test_local_policies_cost_no_gpu():
    local = [policy("mine", engine="local", revision=None, parameters=1e6)]
    made = plan_corpus(local, {"prefix": 100}, RolloutSettings(samples=2), ASSUME)
    assert made["total"]["trajectories"] == 200
    assert (made["total"]["gpu_hours"], made["total"]["money"], made["unknown"]) == (0, 0, [])
    assert made["disk"]["weights"] == 2_000_000
