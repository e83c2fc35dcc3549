"""Stopping a run anywhere and starting it again: it goes on, and ends like one never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from assets.progress import Progress
from assets.run import Item
from tests.assets.homes import ROOT, Home, Watch
from tests.assets.test_staleness import add_policy, answers
from trainer.resume import newest


class Stopper(Watch):
    """A listener that presses Ctrl-C at the second sign of progress of a partition."""

    def __init__(self, partition: str, stop: Callable[[], None]) -> None:
        super().__init__()
        self.partition = partition
        self.stop = stop

    def start(self, item: Item) -> Progress:
        calls = 0

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal calls
            calls += item.partition == self.partition
            if calls == 2:
                self.stop()

        return report


def staged(home: Home) -> list[Path]:
    return sorted((home.path / "staging" / "rollouts").glob("*/*.parquet"))


def interrupted() -> None:
    """What a library does that sees the signal itself."""
    raise KeyboardInterrupt


def test_ctrl_c_that_a_library_turned_into_an_exception_ends_the_run(copy: Home):
    add_policy(copy)
    with pytest.raises(KeyboardInterrupt):
        copy.run("trajectories", Stopper("beech-plain", interrupted))
    assert len(staged(copy)) == 2


@pytest.mark.slow
def test_answers_made_before_a_stop_are_not_made_again(copy: Home):
    before = answers(copy)
    add_policy(copy)
    with pytest.raises(KeyboardInterrupt):
        copy.run("trajectories", Stopper("beech-plain", lambda: signal.raise_signal(signal.SIGINT)))
    batches = staged(copy)
    assert len(batches) == 2
    assert answers(copy) == before
    assert copy.plan("trajectories") == {"trajectories: beech-plain": "never made"}

    outcome = copy.run("trajectories")
    assert [item.title for item in outcome.made] == ["trajectories: beech-plain"]
    assert not staged(copy)
    made_now = copy.one("select count(*) from trajectories") - sum(n for n, _ in before.values())
    assert made_now == next(iter(before.values()))[0]
    import dagster as dg

    with copy.instance() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("trajectories"))
    assert event is not None
    assert event.asset_materialization is not None
    assert event.asset_materialization.metadata["made now"].value == made_now - 2 * 256


@contextmanager
def started(home: Home) -> Iterator[subprocess.Popen[str]]:
    """`polar run` in a session of its own, which does not outlive the test."""
    process = subprocess.Popen(
        home.command("run", "--config", str(home.config)),
        cwd=ROOT,
        env=home.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def stop_when(home: Home, ready: Callable[[], bool], number: int) -> None:
    """Start a run and send it a signal in the middle of something."""
    with started(home) as process:
        deadline = time.monotonic() + 400
        while not ready():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "it never came to that point"
            time.sleep(0.02)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # a terminal sends it to every process of the command
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=180)
    if number == signal.SIGINT:
        assert process.returncode == 130, out + err
        assert "goes on from here" in err
        assert "Traceback" not in err
    else:
        assert process.returncode == -number


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_run_that_is_stopped_twice_ends_like_one_that_is_not(
    made: Home, fresh: Home, number: int
):
    saves = {} if number == signal.SIGINT else {"save_seconds": 0.5}  # Ctrl-C saves by itself
    pretrain = {"max_steps": 120, "epochs": 20, **saves}
    fresh.edit("run.yaml", rollouts={"batch_size": 32}, pretrain=pretrain)
    log = fresh.path / "checkpoints" / "tiny" / "pretrained" / "metrics.jsonl"
    stop_when(fresh, lambda: len(staged(fresh)) >= 3, number)
    stop_when(fresh, lambda: log.exists() and log.read_text().count("\n") >= 8, number)
    if number == signal.SIGINT:
        kept = newest(log.parent)
        assert kept is not None
        last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        assert int(kept.name.removeprefix("step-")) >= last["step"]
    outcome = fresh.run()
    assert outcome.ok
    titles = [item.title for item in outcome.made]
    assert titles == ["pretrained", "finetuned", "finetuned_alone", "report"]
    assert fresh.plan() == {}

    text = "select trajectory_id::varchar as id, text from trajectories order by 1"
    ours, theirs = fresh.query(text), made.query(text)
    assert [row["id"] for row in ours] == [row["id"] for row in theirs]
    different = [a["id"] for a, b in zip(ours, theirs, strict=True) if a["text"] != b["text"]]
    assert len(different) <= len(ours) // 1000, different
    for table in ("policies", "prompts", "duplicates", "pairs", "preferences", "groups"):
        count = f"select count(*) from {table}"
        assert fresh.one(count) == made.one(count)
    steps = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 120
    assert fresh.one("select count(*) from checkpoints") == 4
