"""What maintenance lets go, what it must keep, and that kept snapshots show what they did."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest

from pipelines.errors import LakeError
from pipelines.ids import content_id
from pipelines.lake import Append, Lake, Replace, Upsert
from pipelines.maintenance import maintain
from tests.pipelines.lake_rows import fill, rows, trajectory

NOW = timedelta(0)


def answers(round_: int) -> Replace:
    """Twenty answers, other ones in each round."""
    made = rows("trajectories", *(trajectory("ada", f"r{round_}", i) for i in range(20)))
    return Replace("trajectories", made, "true")


def ids_of(lake: Lake, snapshot: int | None = None) -> list[str]:
    found = lake.query("select trajectory_id::varchar as id from trajectories", snapshot=snapshot)
    return sorted(found["id"].to_pylist())


def snapshots(lake: Lake) -> set[int]:
    return set(lake.query("select snapshot_id from lake.snapshots()")["snapshot_id"].to_pylist())


def test_a_snapshot_that_a_checkpoint_or_an_evaluation_names_survives(tmp_path: Path):
    with Lake.open(tmp_path) as lake:
        fill(lake)
        lake.publish("t", "no groups", [Replace("groups", [], "true")])
        published = [lake.publish("t", f"round {n}", [answers(n)]) for n in range(5)]
        expected = {snapshot: ids_of(lake, snapshot) for snapshot in published}
        named = {"checkpoint_id": content_id("c"), "name": "rm", "snapshot": published[1]}
        seen = {"checkpoint_id": content_id("c"), "snapshot": published[3]}
        changes = [
            Replace("checkpoints", rows("checkpoints", named), "true"),
            Replace("evaluations", rows("evaluations", seen), "true"),
        ]
        newest = lake.publish("t", "trained", changes)
        done = maintain(lake, NOW, keep=NOW)
        kept = snapshots(lake)
        assert {published[1], published[3]} <= kept
        assert not {published[0], published[2], published[4]} & kept  # the newest shows the last's
        assert done["expired"] == newest + 1 - 3  # they count from 0; the two and the newest stay
        for snapshot in (published[1], published[3]):
            assert ids_of(lake, snapshot) == expected[snapshot]
        assert ids_of(lake) == expected[published[4]]
        with pytest.raises(LakeError, match=f"no snapshot {published[0]}"):
            ids_of(lake, published[0])
        assert done["removed"] > 0
        assert done["bytes_after"] < done["bytes_before"]
        again = maintain(lake, NOW, keep=NOW)
        assert (again["removed"], again["bytes_after"]) == (0, again["bytes_before"])
        for snapshot in (published[1], published[3]):
            assert ids_of(lake, snapshot) == expected[snapshot]


def test_groups_that_are_being_trained_on_keep_their_snapshots(tmp_path: Path):
    with Lake.open(tmp_path) as lake:
        fill(lake)
        made_from = lake.publish("t", "answers", [answers(0)])
        group = {"group_id": content_id("g"), "snapshot": made_from, "wrapper": "pretrain"}
        shown = lake.publish("t", "groups", [Replace("groups", rows("groups", group), "true")])
        lake.publish("t", "later", [answers(1)])
        maintain(lake, NOW, keep=NOW)
        assert {made_from, shown} <= snapshots(lake)
        (row,) = lake.query("from groups", snapshot=shown).to_pylist()
        assert row["snapshot"] == made_from


def test_what_is_young_stays_and_without_an_age_all_does(tmp_path: Path):
    with Lake.open(tmp_path) as lake:
        fill(lake)
        lake.publish("t", "one", [answers(0)])
        lake.publish("t", "two", [answers(1)])
        before = snapshots(lake)
        assert maintain(lake, NOW)["expired"] == 0
        assert maintain(lake, NOW, keep=timedelta(hours=1))["expired"] == 0
        assert before <= snapshots(lake)


@pytest.mark.slow
def test_readers_and_publishers_go_on_during_maintenance(tmp_path: Path):
    with Lake.open(tmp_path) as lake:
        fill(lake)
        lake.publish("t", "answers", [answers(0)])
        faults: list[Exception] = []
        over = threading.Event()

        def read() -> None:
            try:
                with Lake.open(tmp_path, read_only=True) as reader:
                    while not over.is_set():
                        assert len(ids_of(reader)) == 20
            except Exception as error:
                faults.append(error)

        def publish() -> None:
            try:
                with Lake.open(tmp_path) as writer:
                    for n in range(10):
                        count = {"source": "w", "stage": "pairs", "reason": str(n), "rows": n}
                        writer.publish("w", f"{n}", [Append("counts", rows("counts", count))])
            except Exception as error:
                faults.append(error)

        reader, writer = threading.Thread(target=read), threading.Thread(target=publish)
        reader.start()
        writer.start()
        for _ in range(3):
            maintain(lake, timedelta(hours=1), keep=NOW)
        writer.join()
        over.set()
        reader.join()
        assert not faults
        found = lake.query("select count(*) as n from counts where source = 'w'").to_pylist()
        assert found == [{"n": 10}]
        lake.publish("t", "still fine", [Upsert("trajectories", answers(0).data)])
