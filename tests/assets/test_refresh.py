"""Refreshes: only what is new, two at once, and what each says changed."""

from __future__ import annotations

import subprocess
import threading
import time
from typing import Any

import dagster as dg
import pytest

from assets.definitions import build_definitions
from assets.run import alone
from tests.assets.homes import ROOT, Home, Watch

PLAIN = {"name": "ash-plain", "kind": "chat", "weights": "ash", "policy_group": "ash"}


def add_policy(home: Home, **more: Any) -> None:
    pool = home.workspace().pool.model_dump(mode="json")["policies"]
    home.edit("pool.yaml", policies=[*pool, {**PLAIN, "split": "train", **more}])


@pytest.mark.slow
def test_two_runs_at_once_make_everything_once(copy: Home):
    add_policy(copy)
    before = copy.one("select count(*) from trajectories")
    command = copy.command("run", "--config", str(copy.config), "--until", "pairs")
    runs = [
        subprocess.Popen(
            command, cwd=ROOT, env=copy.environment(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        said = [run.communicate(timeout=250)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], said
    made = sum("trajectories: ash-plain" in out for out in said)
    assert made == 1
    assert any("waiting for process" in out for out in said)
    assert any("nothing to make" in out for out in said)
    assert copy.one("select count(*) from trajectories") == before + before // 6
    assert not copy.query("select trajectory_id from trajectories group by 1 having count(*) > 1")
    assert copy.plan("pairs") == {}


def test_a_run_waits_its_turn_and_says_so(fresh: Home):
    workspace, watch, order = fresh.workspace(), Watch(), []
    with alone(workspace, None):

        def second() -> None:
            with alone(fresh.workspace(), watch):
                order.append("second")

        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.monotonic() + 20
        while not watch.finished and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "waiting for process" in watch.finished[0][0]
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


@pytest.mark.slow
def test_the_refresh_job_publishes_what_is_new_and_tells_what_changed(copy: Home):
    add_policy(copy)
    add_policy(copy, name="gone", weights="not-there")
    workspace = copy.workspace()
    with copy.instance() as instance:
        result = (
            build_definitions(workspace)
            .resolve_job_def("refresh_corpus")
            .execute_in_process(instance=instance)
        )
        assert result.success
        (event,) = [e for e in result.all_events if e.event_type_value == "STEP_OUTPUT"]
        told = event.event_specific_data.metadata
        record = instance.get_latest_materialization_event(dg.AssetKey("pairs"))
    assert told["failed"].value == []  # a policy without weights is no partition yet
    assert "| ash-plain |" in told["changed: policies"].value.replace(" tiny |", "")
    assert "trajectories" in told["changed: rows"].value
    assert "same_policy" in told["changed: balance"].value
    assert told["lake: bytes after"].value > 0
    metadata = record.asset_materialization.metadata
    assert "ash-plain" in metadata["changed: policies"].value
    assert copy.plan() == {}


def test_pairs_have_a_freshness_policy(fresh: Home):
    graph = build_definitions(fresh.workspace()).resolve_asset_graph()
    policy = graph.get(dg.AssetKey("pairs")).freshness_policy
    assert policy is not None


def test_the_maintenance_asset_reports_bytes(copy: Home):
    workspace = copy.workspace()
    with copy.instance() as instance:
        result = build_definitions(workspace).resolve_implicit_global_asset_job_def()
        done = result.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey("maintenance")]
        )
    (event,) = done.asset_materializations_for_node("maintenance")
    numbers = {name: value.value for name, value in event.metadata.items()}
    assert numbers["bytes_before"] > 0
    assert numbers["after"] <= numbers["before"]
    assert copy.plan() == {}
