"""The asset `scaling` end to end on tiny sizes: asked for by name, gone on with, and growing."""

from __future__ import annotations

import json
import shutil

import dagster as dg
import pytest

from assets.progress import Progress
from assets.run import Item
from tests.assets.homes import Home, Watch, refused

RUNS = [*(f"w8-s{i}" for i in range(3)), *(f"w16-s{i}" for i in range(3)), "w24-s0", "w32-s0",
        "w48-s0"]  # fmt: skip


class Stopper(Watch):
    """A listener that stops a run at a note."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def start(self, item: Item) -> Progress:
        def report(done: int, total: int, note: str = "") -> None:
            if note.startswith(self.at):
                raise KeyboardInterrupt

        return report


def trained(home: Home) -> dict[str, int]:
    """When each run's checkpoint was written."""
    folders = (home.path / "checkpoints" / "tiny" / "scaling").glob("*/training.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in folders}


def test_a_whole_run_leaves_it_alone_and_its_name_asks_for_it(made: Home):
    assert made.plan() == {}
    assert made.plan("scaling") == {"scaling": "never made"}
    assert not trained(made)


def test_it_is_in_the_graph_of_the_ui(made: Home):
    from assets.definitions import build_definitions

    node = build_definitions(made.workspace()).resolve_asset_graph().get(dg.AssetKey("scaling"))
    assert node.group_name == "evaluation"
    assert {key.to_user_string() for key in node.parent_keys} == {"groups"}
    assert "goes on" in (node.description or "")


def test_a_configuration_without_a_plan_says_what_to_add(copy: Home, polar):
    copy.edit("run.yaml", scaling=None)
    command = ("run", "--config", str(copy.config), "--until", "scaling")
    refused(polar(*command, home=copy.path), "names no scaling plan", "scaling: scaling.yaml")


@pytest.mark.slow
def test_it_trains_all_sizes_goes_on_after_a_stop_and_grows(copy: Home):
    with pytest.raises(KeyboardInterrupt):
        copy.run("scaling", Stopper("w24-s0"))
    before = trained(copy)
    assert set(before) == set(RUNS[:6])
    assert copy.plan("scaling") == {"scaling": "never made"}

    assert copy.run("scaling").ok
    after = trained(copy)
    assert set(after) == set(RUNS)
    assert {name: after[name] for name in before} == before
    assert copy.plan("scaling") == {}

    folder = copy.path / "reports" / "tiny" / "scaling"
    record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert [row["run"] for row in record["runs"]] == RUNS
    assert len(record["laws"]) == 4
    assert record["runs"][-1]["C"] >= 30 * record["runs"][0]["C"]
    rows = copy.query(
        "select c.name, e.value, e.low, e.high, e.n from evaluations e join checkpoints c "
        "using (checkpoint_id) where e.suite = 'scaling' and e.metric = 'loss'"
    )
    assert {row["name"]: row["value"] for row in rows} == {
        f"scaling/{row['run']}": row["loss"] for row in record["runs"]
    }
    assert all(row["low"] < row["value"] < row["high"] for row in rows)
    with copy.instance() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("scaling"))
    assert event is not None
    assert event.asset_materialization is not None
    shown = event.asset_materialization.metadata
    assert "data:image/png" in str(shown["loss"].value)
    assert "a N^-b + floor" in str(shown["laws"].value)

    # a run that is lost is trained again, and a size that joins the plan leaves the others
    shutil.rmtree(copy.path / "checkpoints" / "tiny" / "scaling" / "w32-s0")
    plan = (copy.config.parent / "scaling.yaml").read_text(encoding="utf-8")
    larger = "  - {name: w64, language: {hidden: 64, intermediate: 128}}\n"
    (copy.config.parent / "scaling.yaml").write_text(plan + larger, encoding="utf-8")
    assert copy.plan("scaling") == {"scaling": "changed: settings"}
    assert copy.run("scaling").ok
    grown = trained(copy)
    assert {name for name, at in grown.items() if after.get(name) != at} == {"w32-s0", "w64-s0"}
    assert copy.plan() == {}
