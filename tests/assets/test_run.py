"""A complete run of the tiny pool: what it leaves in the lake, on disk and in Dagster."""

from __future__ import annotations

import json
import shutil

import dagster as dg
import pytest

from assets.stages import stages
from pipelines.schemas import CELLS, TABLES
from tests.assets.homes import Home

NAMES = [name for name, stage in stages(recorded=False).items() if not stage.on_demand]
CHECKPOINTS = {"backbone", "pretrained", "finetuned", "finetuned_alone"}


def last(home: Home, asset: str) -> dg.AssetMaterialization:
    with home.instance() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey(asset))
    assert event is not None
    assert event.asset_materialization is not None
    return event.asset_materialization


def test_every_table_is_filled(made: Home):
    with made.workspace().lake(read_only=True) as lake:
        rows = lake.row_counts()
    assert set(rows) == set(TABLES)
    assert [name for name, count in rows.items() if not count] == ["quarantine"]


def test_a_policy_answers_every_instruction(made: Home):
    asked = made.one("select count(*) from prompts where kind = 'instruction'")
    answers = made.query("select policy_id, count(*) as n from trajectories group by 1")
    assert [row["n"] for row in answers] == [3 * asked] * 6
    assert made.one("select count(*) from trajectories where correct") > 50


def test_groups_fill_all_cells_and_both_wrappers(made: Home):
    cells = made.query("select wrapper, split, cell, count(*) as n from groups group by all")
    found = {(row["wrapper"], row["split"], row["cell"]) for row in cells}
    assert {("pretrain", "eval", cell) for cell in CELLS} < found
    assert ("sft", "train", "seen") in found
    assert ("sft", "eval", "new_prompt") in found


def test_publishes_say_who_and_what(made: Home):
    snapshots = made.query("select author, commit_message from lake.snapshots()")
    said = {row["commit_message"] for row in snapshots if row["author"] == "polar"}
    for start in ("policies: 6", "trajectories of ash: ", "pairs: ", "checkpoint tiny/pretrained"):
        assert any(message.startswith(start) for message in said), (start, said)


def test_checkpoints_name_snapshot_and_parent(made: Home):
    rows = made.query(
        "select c.name, c.stage, p.name as parent, c.snapshot, c.path from checkpoints c "
        "left join checkpoints p on p.checkpoint_id = c.parent"
    )
    by_name = {row["name"]: row for row in rows}
    assert set(by_name) == CHECKPOINTS
    assert by_name["pretrained"]["parent"] == "backbone"
    assert by_name["finetuned"]["parent"] == "pretrained"
    assert by_name["finetuned_alone"]["parent"] == "backbone"
    (snapshot,) = {row["snapshot"] for row in rows}
    pairs = made.one("select count(*) from pairs")
    with made.workspace().lake(read_only=True) as lake:
        then = lake.query("select count(*) as n from pairs", snapshot=snapshot).to_pylist()
    assert then == [{"n": pairs}]
    for row in rows:
        folder = made.path / row["path"]
        assert (folder / "model.safetensors").exists()
        if row["name"] != "backbone":
            polar = json.loads((folder / "polar.json").read_text(encoding="utf-8"))
            assert polar["snapshot"] == snapshot
            assert polar["stage"] == row["stage"]


def test_evaluations_are_of_these_checkpoints_with_rulers(made: Home):
    rows = made.query(
        "select c.name, e.suite, e.scorer, e.cell from evaluations e "
        "left join checkpoints c using (checkpoint_id) where metric = 'accuracy'"
    )
    named = {(row["suite"], row["name"]) for row in rows}
    assert named == {("policy_discrimination", "pretrained"), ("preference", "finetuned")}
    scorers = {row["scorer"] for row in rows}
    assert {"model", "length", "tfidf", "random", "shuffled_reference"} <= scorers
    assert {"without_pretraining", "pretrained_only"} <= scorers


def test_report_files_are_there_and_say_the_same(made: Home):
    folder = made.path / "reports" / "tiny"
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script src" not in html
    assert "policy discrimination" in html.lower()
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert found
    assert (folder / "report.md").read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("asset", NAMES)
def test_what_dagster_shows_of_an_asset(made: Home, asset: str):
    """Description, group, row count, a plot, and a link to the table, folder or report."""
    from assets.definitions import build_definitions

    graph = build_definitions(made.workspace()).resolve_asset_graph()
    node = graph.get(dg.AssetKey(asset))
    assert node.description
    assert len(node.description) > 40
    assert node.group_name == stages(recorded=False)[asset].group
    metadata = last(made, asset).metadata
    kinds = [type(value) for value in metadata.values()]
    pictures = [
        value
        for value in metadata.values()
        if isinstance(value, dg.MarkdownMetadataValue) and "data:image/png" in value.value
    ]
    assert pictures
    assert {"table", "folder", "report", "files"} & set(metadata)
    if asset in CHECKPOINTS | {"embedded_policies"}:
        assert dg.PathMetadataValue in kinds
    else:
        assert metadata["dagster/row_count"].value > 0


def test_graph_reads_in_four_groups(made: Home):
    from assets.definitions import build_definitions

    graph = build_definitions(made.workspace()).resolve_asset_graph()
    groups: dict[str, set[str]] = {}
    for key in graph.get_all_asset_keys():
        groups.setdefault(graph.get(key).group_name, set()).add(key.to_user_string())
    assert groups == {
        "pool": {"embedded_policies", "policies", "prompts"},
        "corpus": {
            *("trajectories", "preferences", "duplicates", "pairs", "groups"),
            "maintenance",
        },
        "training": CHECKPOINTS,
        "evaluation": {"report", "scaling"},
    }
    below = graph.get(dg.AssetKey("pairs")).parent_keys
    assert {key.to_user_string() for key in below} == {"duplicates", "policies", "prompts"}


def test_every_check_is_blocking_described_and_passed(made: Home):
    from assets.checks import all_checks, check_keys

    for check in all_checks():
        for spec in check.check_specs:
            assert spec.blocking
            assert spec.description
    with made.instance() as instance:
        last = instance.event_log_storage.get_latest_asset_check_execution_by_key(check_keys())
    assert set(last) == set(check_keys())
    assert {record.status.value for record in last.values()} == {"SUCCEEDED"}


def test_refresh_is_weekly_and_off(made: Home):
    from assets.definitions import build_definitions

    definitions = build_definitions(made.workspace())
    schedule = definitions.resolve_schedule_def("refresh_corpus")
    assert schedule.cron_schedule == "0 3 * * 1"
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    assert definitions.resolve_job_def("refresh_corpus") is not None


@pytest.mark.slow
def test_refresh_makes_what_is_stale(copy: Home):
    from assets.definitions import build_definitions

    shutil.rmtree(copy.path / "reports")
    workspace = copy.workspace()
    with copy.instance() as instance:
        job = build_definitions(workspace).resolve_job_def("refresh_corpus")
        result = job.execute_in_process(instance=instance)
        assert result.success
    assert (copy.path / "reports" / "tiny" / "report.html").exists()
    assert copy.plan() == {}


def test_one_worker_makes_the_home_of_all_tests(made: Home, request: pytest.FixtureRequest):
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@house")


def test_second_run_makes_nothing(made: Home):
    runs, snapshot = made.dagster_runs(), made.one("from lake.current_snapshot()")
    assert made.plan() == {}
    outcome = made.run()
    assert outcome.ok
    assert outcome.made == []
    assert (made.dagster_runs(), made.one("from lake.current_snapshot()")) == (runs, snapshot)


def test_definitions_load_from_the_environment(made: Home, monkeypatch: pytest.MonkeyPatch):
    from assets import definitions

    monkeypatch.setenv("POLAR_HOME", str(made.path))
    monkeypatch.setenv("POLAR_CONFIG", str(made.config))
    keys = definitions.defs().resolve_asset_graph().get_all_asset_keys()
    assert {key.to_user_string() for key in keys} == {*NAMES, "maintenance", "scaling"}
    monkeypatch.setenv("POLAR_CONFIG", "configs/recorded.yaml")
    monkeypatch.setenv("POLAR_DATA", str(made.path))
    keys = definitions.defs().resolve_asset_graph().get_all_asset_keys()
    wanted = {"policies", "prompts", "trajectories", "preferences", "duplicates", "pairs", "groups"}
    assert {key.to_user_string() for key in keys} == wanted | CHECKPOINTS | {
        "report",
        "maintenance",
        "scaling",
    }


def test_a_moved_home_is_still_current(copy: Home):
    """Nothing of what a stage was made with is a place."""
    assert copy.plan() == {}
    assert copy.one("select count(*) from triples") > 0
