"""Refreshes: only what is new, two at once, and what each says changed."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets import corpus
from assets.definitions import build_definitions
from assets.turns import alone
from pipelines.ids import content_id
from pipelines.lake import Append
from tests.assets.homes import ROOT, Home, Watch
from tests.pipelines.lake_rows import rows

PLAIN = {"name": "ash-plain", "kind": "chat", "weights": "ash", "policy_group": "ash"}


def add_policy(home: Home, **more: Any) -> None:
    pool = home.workspace().pool.model_dump(mode="json")["policies"]
    home.edit("pool.yaml", policies=[*pool, {**PLAIN, "split": "train", **more}])


@pytest.mark.slow
def test_two_runs_at_once_make_everything_once(copy: Home):
    add_policy(copy)
    before = copy.one("select count(*) from trajectories")
    command = copy.command("run", "--config", str(copy.config), "--until", "trajectories")
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
    assert copy.plan("trajectories") == {}


def test_a_run_waits_its_turn_and_says_so(fresh: Home):
    workspace, watch, order = fresh.workspace(), Watch(), []
    with alone(workspace):

        def second() -> None:
            with alone(fresh.workspace(), watch.wait):
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


@pytest.mark.slow
def test_duplicates_go_on_from_what_they_know(copy: Home):
    """New answers alone are looked at, and the clusters are those of all looked at anew."""
    workspace = copy.workspace()
    known = copy.query("from trajectories order by length(text) desc, trajectory_id limit 1")[0]
    whose = {name: known[name].bytes for name in ("policy_id", "prompt_id")}
    said = [known["text"], f"{known['text']} and one word more", "nobody ever said this here"]
    new = [
        {**whose, "trajectory_id": content_id("t", n), "sample_index": 90 + n, "text": text}
        | {"content_hash": content_id("text", text)}
        for n, text in enumerate(said)
    ]
    copy.publish(Append("trajectories", rows("trajectories", *new)))

    def materialise() -> tuple[int, list[dict[str, Any]]]:
        with copy.instance() as instance:
            done = dg.materialize(
                corpus.ASSETS,
                selection="duplicates",
                instance=instance,
                resources={"workspace": dg.ResourceDefinition.hardcoded_resource(workspace)},
            )
        (event,) = done.asset_materializations_for_node("duplicates")
        return event.metadata["new answers"].value, copy.query("from duplicates order by all")

    def parts() -> dict[Path, int]:
        files = (workspace.dedup_index / "parts").rglob("*")
        return {path: path.stat().st_mtime_ns for path in files if path.is_file()}

    before = parts()
    looked_at, found = materialise()
    assert looked_at == 3
    assert before
    assert before.items() < parts().items()  # what was known lies where it lay
    added = {row["trajectory_id"].bytes for row in found} & {row["trajectory_id"] for row in new}
    assert {content_id("t", 0)} <= added
    shutil.rmtree(workspace.dedup_index)
    assert materialise() == (copy.one("select count(*) from trajectories"), found)


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


@pytest.mark.slow
def test_the_sensor_finds_a_new_checkpoint_and_a_run_makes_its_answers(copy: Home):
    watch = {"name": "more", "folder": "runs/more", "kind": "chat", "parent": "ash", "settled": 0}
    copy.edit("pool.yaml", watch=[watch | {"template": "Q: {prompt} A:", "split": "train"}])
    workspace = copy.workspace()
    definitions = build_definitions(workspace)
    sensor = definitions.resolve_sensor_def("new_checkpoints")

    def tick(instance: dg.DagsterInstance) -> Any:
        context = dg.build_sensor_context(
            instance=instance, definitions=definitions, resources={"workspace": workspace}
        )
        return sensor.evaluate_tick(context)

    with copy.instance() as instance:
        assert "no new checkpoint" in str(tick(instance).skip_message)
        run = copy.path / "policies" / "runs" / "more"
        shutil.copytree(copy.path / "policies" / "school", run / "step-200")
        whole = (run / "step-200" / "model.safetensors").read_bytes()
        (run / "step-200" / "model.safetensors").write_bytes(whole[:-1])
        assert "step-200: model.safetensors is cut off" in str(tick(instance).skip_message)
        (run / "step-200" / "model.safetensors").write_bytes(whole)
        result = tick(instance)
        assert len(result.run_requests) == 1
        assert sensor.job.name == "refresh_corpus"
        (added,) = result.dynamic_partitions_requests
        assert list(added.partition_keys) == ["more-200"]
        assert tick(instance).run_requests[0].run_key == result.run_requests[0].run_key
    outcome = copy.run("trajectories")
    assert [item.title for item in outcome.made] == ["policies", "trajectories: more-200"]
    (row,) = copy.query(
        "select y.lineage_step, p.name as parent, count(t.trajectory_id) as answers "
        "from policies y join policies p on p.policy_id = y.parent "
        "join trajectories t on t.policy_id = y.policy_id "
        "where y.name = 'more-200' group by all"
    )
    assert row == {"lineage_step": 200, "parent": "ash", "answers": 448 * 3}
    with copy.instance() as instance:
        assert "more-200" in instance.get_dynamic_partitions("policies")
        assert "no new checkpoint" in str(tick(instance).skip_message)
    assert copy.plan("trajectories") == {}
