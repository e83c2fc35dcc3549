"""Runs of one corpus take turns, also where Dagster starts one beside another."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from assets.turns import alone, scratch
from assets.workspace import Workspace
from tests.assets.recorded_data import lines, records


@pytest.fixture
def workspaces(tmp_path: Path) -> list[Workspace]:
    home = records(tmp_path, tmp_path / "home", lines(prompts=1))
    return [home.workspace(), home.workspace()]


def test_scratch_files_are_of_one_run_at_a_time(workspaces: list[Workspace]):
    mine, theirs = workspaces
    said, found = [], []
    waits, inside = threading.Event(), threading.Event()

    def say(note: str) -> None:
        said.append(note)
        waits.set()

    def other() -> None:
        with scratch(theirs, "pairs", say) as work:
            inside.set()
            found.extend(work.iterdir())

    beside = threading.Thread(target=other)
    with scratch(mine, "pairs") as work:
        (work / "half").write_text("of mine")
        beside.start()
        assert waits.wait(10)
        assert not inside.wait(1)
        assert (work / "half").read_text() == "of mine"
    beside.join(10)
    assert inside.is_set()
    assert not found
    assert "waiting for process" in said[0]
    assert not work.exists()


def test_what_a_killed_run_left_is_removed(workspaces: list[Workspace]):
    mine, _ = workspaces
    left = mine.work_dir / "pairs" / "half"
    left.parent.mkdir(parents=True)
    left.touch()
    with scratch(mine, "pairs") as work:
        assert work == left.parent
        assert not any(work.iterdir())


def test_a_run_that_has_its_turn_does_not_wait_for_itself(workspaces: list[Workspace]):
    mine, theirs = workspaces
    with alone(mine):
        with scratch(mine, "pairs", pytest.fail):
            assert mine.has_turn
        assert mine.has_turn
        assert not theirs.has_turn
    assert not mine.has_turn
    with pytest.raises(ValueError, match="a fault"), alone(mine):
        raise ValueError("a fault")  # noqa: EM101
    with alone(theirs, pytest.fail):
        pass
