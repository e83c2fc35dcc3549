"""Recorded trajectories from files to groups, and two configurations in one home."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.engines import recorded
from tests.assets.homes import Home, stray_pair
from tests.assets.recorded_data import FAULTS, lines, records, write

OURS = {
    table: f"select * from {table} where prompt_id in (select prompt_id from prompts "
    "where source = 'tiny')"
    for table in ("prompts", "trajectories", "pairs", "preferences", "groups")
}


def rows_of_tiny(home: Home) -> dict[str, int]:
    with home.workspace().lake(read_only=True) as lake:
        found = {
            table: lake.query(f"select count(*) as n, sum(hash(t)) as h from ({sql}) t").to_pylist()
            for table, sql in OURS.items()
        }
    return found


@pytest.mark.slow
def test_two_configurations_in_one_home_leave_each_other_alone(copy: Home, tmp_path: Path):
    before, runs = rows_of_tiny(copy), copy.dagster_runs()
    other = records(tmp_path, copy.path)
    outcome = other.run("groups")
    assert outcome.ok, outcome.failed
    assert [item.title for item in outcome.made] == ["recorded", "duplicates", "pairs", "groups"]
    assert copy.dagster_runs() == runs + 4
    assert other.plan("groups") == {}
    assert copy.plan() == {}
    assert rows_of_tiny(copy) == before
    assert in_source(other, "small", "trajectories") == 400
    pairs = in_source(other, "small", "pairs")
    # Other data is ingested again, and only by the configuration that reads it. A check that fails
    # for one configuration says nothing about the other's stages.
    write(tmp_path / "data", lines("other"))
    plan = other.plan("groups")
    assert plan["recorded"] == "changed: data"
    assert set(plan) == {"recorded", "duplicates", "pairs", "groups"}
    copy.publish(*stray_pair())
    assert other.run("groups").stopped == "pairs"
    assert copy.plan() == {}
    assert rows_of_tiny(copy) == before
    assert in_source(other, "small", "pairs") == pairs
    asked = other.one("select sum(rows)::bigint from counts where stage = 'dedup' and what = 'in' "
                      "and source = 'other'")  # fmt: skip
    assert asked == 400


@pytest.mark.slow
def test_prompts_that_are_gone_take_their_pairs_and_groups_along(tmp_path: Path):
    home = records(tmp_path, tmp_path / "home", lines(prompts=12, policies=6))
    assert home.run("groups").ok
    before = {table: home.one(f"select count(*) from {table}") for table in ("pairs", "groups")}
    write(tmp_path / "data", lines(prompts=8, policies=6))
    outcome = home.run("groups")
    assert outcome.ok, outcome.failed
    for table, rows in before.items():
        assert 0 < home.one(f"select count(*) from {table}") < rows
        kept = f"select count(*) from {table} join prompts using (prompt_id)"
        assert home.one(kept) == home.one(f"select count(*) from {table}")
    assert home.plan("groups") == {}


def test_judgements_alone_end_with_what_they_are_good_for(tmp_path: Path):
    home = records(tmp_path, tmp_path / "home")
    (tmp_path / "data" / "trajectories.jsonl").unlink()
    rows = [
        {
            "prompt": f"What is {n} + {n}?",
            "response_1": f"It is {2 * n}.",
            "response_2": f"I think {2 * n}, or so.",
            "response_3": f"{3 * n}.",
        }
        for n in range(40)
    ]
    (tmp_path / "data" / "ranked_triples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    outcome = home.run("groups")
    ((item, error),) = outcome.failed
    assert item.title == "groups"
    command = error[error.index("polar finetune") :].split()
    groups = pq.read_table(command[command.index("--data") + 1])
    assert groups.num_rows > 20
    assert set(groups["wrapper"].to_pylist()) == {"sft"}


def in_source(home: Home, source: str, table: str) -> int:
    return home.one(
        f"select count(*) from {table} join prompts using (prompt_id) where source = '{source}'"
    )


def test_a_place_is_not_part_of_the_data(tmp_path: Path):
    home = records(tmp_path, tmp_path / "home")
    assert home.run("trajectories").ok
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "data", tmp_path / "elsewhere" / "data")
    moved = Home(home.path, home.config, tmp_path / "elsewhere" / "data")
    assert moved.plan("trajectories") == {}


def test_answers_of_a_source_that_another_configuration_read_are_read_again(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = records(tmp_path / "one", tmp_path / "home")
    two = records(tmp_path / "two", tmp_path / "home", lines()[:200])
    two.edit("records.yaml", name="fewer")
    for home, answers in ((one, 400), (two, 200)):
        assert home.run("trajectories").ok
        assert in_source(home, "small", "trajectories") == answers
    assert two.plan("trajectories") == {}
    assert one.plan("trajectories") == {"recorded": "replaced by the configuration 'fewer'"}
    assert one.run("trajectories").ok
    assert in_source(one, "small", "trajectories") == 400


def test_another_import_leaves_what_was_set_aside(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name / "data").parent.mkdir()
    one = records(tmp_path / "one", tmp_path / "home", [FAULTS[1], *lines()])
    file = tmp_path / "two" / "alone.jsonl"
    file.write_bytes(b"\n".join([*lines("other"), FAULTS[2], b""]))
    records(tmp_path / "two", tmp_path / "home")
    two = Home(one.path, tmp_path / "two" / "records.yaml", file)
    two.edit("records.yaml", name="other")
    where = "select file, row from quarantine order by file"
    for home in (one, two, one, two):
        if home is two:
            file.write_bytes(file.read_bytes() + FAULTS[3] + b"\n")
        assert home.run("trajectories").ok
    assert one.query(where) == [
        {"file": "alone.jsonl", "row": 401},
        {"file": "alone.jsonl", "row": 402},
        {"file": "alone.jsonl", "row": 403},
        {"file": "data/trajectories.jsonl", "row": 1},
    ]
    (tmp_path / "one" / "data").rename(tmp_path / "one" / "moved")
    moved = Home(one.path, one.config, tmp_path / "one" / "moved")
    for rows, named in (
        ([*lines("more"), FAULTS[1]], {"moved/trajectories.jsonl"}),
        (lines(), set()),
    ):
        write(tmp_path / "one" / "moved", rows)
        assert moved.run("trajectories").ok
        assert {row["file"] for row in one.query(where)} == {"alone.jsonl"} | named


def test_a_file_that_grows_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch):
    home = records(tmp_path, tmp_path / "home", lines()[:300])
    ingest = recorded.ingest

    def grown_meanwhile(*given):
        found = ingest(*given)
        write(tmp_path / "data", lines())
        return found

    with monkeypatch.context() as patch:
        patch.setattr(recorded, "ingest", grown_meanwhile)
        assert home.run("trajectories").ok
    assert in_source(home, "small", "trajectories") == 300
    assert home.plan("trajectories") == {"recorded": "changed: data"}
    assert home.run("trajectories").ok
    assert in_source(home, "small", "trajectories") == 400
    assert home.plan("trajectories") == {}


@pytest.mark.slow
def test_bad_lines_are_set_aside_with_their_place_and_the_rest_goes_on(tmp_path: Path):
    good = lines()
    at = [3, 50, 120, 300]
    rows = list(good)
    for place, fault in zip(at, FAULTS, strict=True):
        rows.insert(place, fault)
    home = records(tmp_path, tmp_path / "home", rows)
    done = home.polar_run("--until", "pairs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 bad input rows" in done.stdout
    assert 'polar sql "from quarantine"' in done.stdout
    assert home.one("select count(*) from trajectories") == len(good)
    assert home.one("select count(*) from pairs") > 100
    found = home.query("select row, file, problem from quarantine order by row")
    assert [row["row"] for row in found] == [place + 1 for place in at]
    assert {Path(row["file"]).name for row in found} == {"trajectories.jsonl"}
    assert all(row["problem"] for row in found)
    counted = home.query(
        "select what, sum(rows)::bigint as n from counts where stage = 'ingest' group by 1"
    )
    numbers = {row["what"]: row["n"] for row in counted}
    assert numbers["quarantined"] == 4
    assert numbers["in"] == sum(n for what, n in numbers.items() if what != "in")
