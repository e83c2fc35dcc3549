"""Policies behind servers, in the graph: caps, failures, what is published, Dagster's pool."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from assets.definitions import build_definitions
from pipelines.engines import asking, vllm_server
from pipelines.errors import PolicyUnavailableError
from tests.assets.homes import ROOT, Home
from tests.pipelines import fake_endpoint, tiny_policy
from tests.pipelines.test_vllm import family, left_of

RUN = {
    "name": "served",
    "pool": "pool.yaml",
    "threads": 1,
    "prompt_sources": {"files": [{"name": "tasks", "path": "tasks.jsonl", "kind": "instructions"}]},
    "rollouts": {"assignment": "dense", "samples": 2, "sampling": {"max_tokens": 16}},
}


def home_of(folder: Path, *policies: dict[str, Any], tasks: int = 300, **pool: Any) -> Home:
    """A home whose pool trains nothing, with some instructions to ask."""
    lines = [json.dumps({"prompt": f"Tell me of the number {n}."}) + "\n" for n in range(tasks)]
    (folder / "tasks.jsonl").write_text("".join(lines), encoding="utf-8")
    said = {"source": "served", "policies": list(policies)} | pool
    (folder / "pool.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    return Home(folder / "home", folder / "run.yaml")


def vendor(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "api",
        "engine": "openai",
        "weights": name,
        "revision": "1",
    } | more


@pytest.fixture
def fake() -> Iterator[fake_endpoint.Endpoint]:
    endpoint = fake_endpoint.Endpoint()
    yield endpoint
    endpoint.close()


@pytest.mark.slow
def test_a_cap_stops_one_policy_and_what_it_made_is_published(
    fake: fake_endpoint.Endpoint, tmp_path: Path
):
    plain = {"base_url": fake.url}
    capped = plain | {"max_tokens_in_all": 1500}
    home = home_of(tmp_path, vendor("capped", openai=capped), vendor("free"), openai=plain)
    outcome = home.run("trajectories")
    assert outcome.stopped is None
    ((failed, error),) = outcome.failed
    assert failed.title == "trajectories: capped"
    assert "stopped before a cap is passed" in error
    assert "max_tokens_in_all 1,500" in error

    made = "select count(*) from trajectories join policies using (policy_id) where name = '{}'"
    some, every = home.one(made.format("capped")), home.one(made.format("free"))
    assert 0 < some < every
    left = home.query("from counts where label = 'capped' and what = 'excluded'")
    assert [(row["reason"], row["rows"]) for row in left] == [("policy_unavailable", every - some)]
    assert home.plan("trajectories") == {"trajectories: capped": "never made"}

    home.edit("pool.yaml", policies=[vendor("capped"), vendor("free")])
    outcome = home.run("trajectories")
    assert [item.title for item in outcome.made] == ["trajectories: capped"]  # no new policies
    assert home.one(made.format("capped")) == every
    asked = [(b["model"], b["messages"][0]["content"]) for b in fake.bodies]
    assert len(asked) == len(set(asked))
    assert home.query("select distinct engine, engine_version from trajectories") == [
        {"engine": "openai", "engine_version": "m-1"}
    ]
    assert home.plan("trajectories") == {}


@pytest.mark.slow
def test_answers_that_an_outage_cost_are_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(asking, "FIRST_DELAY", 0.01)
    overloaded = [True]

    def answer(body: dict[str, Any], number: int) -> tuple[int, Any, dict[str, str]]:
        if number >= 5 and overloaded:
            return 500, {"error": {"message": "overloaded"}}, {}
        return fake_endpoint.good(body)

    fake = fake_endpoint.Endpoint(answer)
    try:
        home = home_of(tmp_path, vendor("v"), tasks=20, openai={"base_url": fake.url})
        assert home.run("duplicates").ok
        some = home.one("select count(*) from trajectories")
        assert 0 < some < 40
        owed = {"trajectories: v": f"{40 - some} not answered by a failing server"}
        assert home.plan("trajectories") == owed
        assert home.run("duplicates").made[0].title == "trajectories: v"  # still overloaded
        assert home.plan("trajectories") == owed
        overloaded.clear()
        made = [item.title for item in home.run("duplicates").made]
        assert made == ["trajectories: v", "duplicates"]
        assert home.one("select count(*) from trajectories") == 40
        assert home.query("select reason from counts where what = 'excluded' and rows > 0") == []
        assert home.plan("duplicates") == {}
    finally:
        fake.close()


@pytest.mark.slow
def test_prompts_of_a_policy_that_leaves_fall_to_the_others(
    fake: fake_endpoint.Endpoint, tmp_path: Path
):
    names = ("a", "b", "c")
    home = home_of(tmp_path, *map(vendor, names), tasks=40, openai={"base_url": fake.url})
    home.edit("run.yaml", rollouts={"assignment": "sparse", "policies_per_prompt": 1})
    assert home.run("duplicates").ok
    by_policy = "select name, count(*) as n from trajectories join policies using (policy_id) "
    before = {row["name"]: row["n"] for row in home.query(by_policy + "group by 1")}
    assert sum(before.values()) == 80
    assert set(before) == set(names)
    home.edit("pool.yaml", policies=[vendor("a"), vendor("b")])
    made = {item.title: item.reason for item in home.run("duplicates").made}
    left = "prompts of policies that left the pool"
    assert (made["trajectories: a"], made["trajectories: b"]) == (left, left)
    assert "duplicates" in made
    after = {row["name"]: row["n"] for row in home.query(by_policy + "group by 1")}
    assert after["c"] == before["c"]  # its answers stay
    assert after["a"] + after["b"] == 80
    assert home.plan("duplicates") == {}
    home.edit("pool.yaml", policies=list(map(vendor, names)))
    assert not set(home.plan("trajectories")) & {"trajectories: a", "trajectories: b"}
    assert home.run("duplicates").ok
    assert {row["name"]: row["n"] for row in home.query(by_policy + "group by 1")} == after


def test_a_pool_with_vllm_takes_the_place_of_the_gpu(tmp_path: Path):
    home = home_of(tmp_path, {"name": "a", "kind": "base", "weights": "a"})

    def pool() -> str | None:
        definitions = build_definitions(home.workspace())
        node = definitions.resolve_assets_def("trajectories").node_def
        assert isinstance(node, dg.OpDefinition)
        return node.pool

    assert pool() == "rollouts"
    home.edit("run.yaml", engine="vllm")
    assert pool() == "gpu"
    with home.instance() as instance:
        storage = instance.event_log_storage
        assert {(one.name, one.limit) for one in storage.get_pool_limits()} == {("gpu", 1)}
        storage.set_concurrency_slots("gpu", 3)
    with home.instance() as instance:
        (limit,) = instance.event_log_storage.get_pool_limits()
        assert limit.limit == 3


@pytest.mark.slow
def test_a_model_that_is_too_large_and_a_vllm_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weights = tiny_policy.save(tmp_path / "weights", head=32)
    policy = {"name": "a", "kind": "chat", "weights": str(weights), "engine": "vllm"}
    home = home_of(tmp_path, policy, vllm={"device": "cpu", "kv_cache_gib": 99_999})
    monkeypatch.setenv("POLAR_VLLM_PYTHON", str(tmp_path / "nowhere"))
    ((_, error),) = home.run("trajectories").failed
    assert f"{tmp_path}/nowhere: no Python with vLLM there; run `make vllm`" in error
    monkeypatch.setenv("POLAR_VLLM_PYTHON", "/bin/true")
    ((_, error),) = home.run("trajectories").failed
    assert "does not fit into memory: need 100000.0 GiB (weights 0.0 GiB, keys and" in error
    assert "GiB; lower kv_cache_gib" in error


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_no_server_and_goes_on(tmp_path: Path, number: signal.Signals):
    try:
        vllm_server.interpreter()
    except PolicyUnavailableError as error:
        pytest.skip(str(error))
    weights = tiny_policy.save(tmp_path / "weights", head=32)
    policy = {
        "name": "a",
        "kind": "chat",
        "interface": "completions",
        "weights": str(weights),
        "engine": "vllm",
    }
    options = {"device": "cpu", "dtype": "float32", "kv_cache_gib": 1, "concurrency": 2}
    home = home_of(tmp_path, policy, tasks=1500, vllm=options)
    command = home.command("run", "--config", str(home.config), "--until", "trajectories")
    process = subprocess.Popen(command, cwd=ROOT, env=home.environment(), start_new_session=True)
    members: set[tuple[int, str]] = set()
    try:
        while process.poll() is None and not list(home.path.glob("staging/rollouts/*/*")):
            time.sleep(0.05)
        members = family(process.pid)
        assert len(members) >= 4  # driver, guard, server, engine
        os.kill(process.pid, number)
        code = process.wait(timeout=60)
    finally:
        process.kill()
    assert code in (130, -number)
    assert not left_of(members)
    if number == signal.SIGKILL:
        done = home.polar_run("--until", "trajectories", timeout=1200)  # a server, and few cores
        assert done.returncode == 0, done.stdout + done.stderr
        assert home.one("select count(*) from trajectories") == 3000
