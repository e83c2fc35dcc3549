"""What is kept summed is always what its tables say."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.errors import LakeError
from pipelines.ids import content_id
from pipelines.lake import Append, Change, Lake, Replace, Upsert
from pipelines.sums import SUMS
from tests.pipelines.lake_rows import fill, rows, trajectory

POLICIES, PROMPTS = ("ada", "bob", "eve"), ("north", "south")


@pytest.fixture
def lake(tmp_path: Path):
    with Lake.open(tmp_path) as lake:
        fill(lake)
        yield lake


def differing(lake: Lake) -> list[dict]:
    """Rows of the tables and of their queries that the other lacks."""
    found = []
    for table, sums in SUMS.items():
        kept, fresh = f"from {table}", f"from ({sums.sql})"
        sql = f"({kept} except all {fresh}) union all ({fresh} except all {kept})"
        found += lake.query(sql).to_pylist()
    return found


def answers(numbers: list[tuple[int, int, int]]) -> list[dict]:
    return [
        trajectory(POLICIES[p], PROMPTS[q], index, "la " * (p + q + index))
        | {"original_length": 3 * (p + q + index), "tokens": index or None}
        | {"flags": ["loop", "empty"][:index], "correct": [None, True, False][index]}
        for p, q, index in numbers
    ]


NUMBERS = st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 2))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["upsert", "replace", "duplicates", "policies", "pairs"]),
            st.lists(NUMBERS, max_size=5, unique=True),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_sums_are_those_of_the_rows_after_any_publish(lake: Lake, steps):
    for kind, numbers in steps:
        data = rows("trajectories", *answers(numbers))
        same = [
            {"trajectory_id": row, "scope": "prompt"} for row in data["trajectory_id"].to_pylist()
        ]
        names = sorted({POLICIES[p] for p, *_ in numbers})
        people = [{"policy_id": content_id("policy", name), "name": name} for name in names]
        pairs = [
            {"trajectory_a": i.to_bytes(16, "big"), "trajectory_b": b"z" * 16}
            | {"prompt_id": content_id("prompt", PROMPTS[q]), "cell": POLICIES[p], "label": str(n)}
            for i, (p, q, n) in enumerate(numbers)
        ]
        changes: dict[str, Change] = {
            "upsert": Upsert("trajectories", data),
            "replace": Replace("trajectories", data, "true"),
            "duplicates": Replace("duplicates", rows("duplicates", *same), "true"),
            "policies": Replace("policies", rows("policies", *people), "true"),
            "pairs": Replace("pairs", rows("pairs", *pairs), "true"),
        }
        lake.publish("tests", kind, [changes[kind]])
        assert differing(lake) == []


def test_a_publish_that_changes_no_row_makes_no_snapshot(lake: Lake):
    before = lake.snapshot()
    lake.publish("tests", "nothing", [Upsert("trajectories", rows("trajectories"))])
    assert lake.snapshot() == before


def test_a_snapshot_shows_the_sums_of_its_own_rows(lake: Lake):
    before = lake.snapshot()
    lake.publish("tests", "none left", [Replace("trajectories", rows("trajectories"), "true")])
    overview = "select sum(trajectories)::bigint from pool_overview"
    assert lake.query(overview)[0][0].as_py() == 0
    assert lake.query(overview, snapshot=before)[0][0].as_py() == 12


def test_sums_are_not_published(lake: Lake):
    with pytest.raises(LakeError, match="answer_sums is summed by publish itself; publish what it"):
        lake.publish("tests", "sums", [Append("answer_sums", rows("answer_sums"))])


def test_a_lake_from_before_the_table_is_summed_when_it_is_opened(tmp_path: Path):
    with Lake.open(tmp_path) as lake:
        fill(lake)
        lake.commit("tests", "as it was", [f"drop table {table}" for table in SUMS])
    with Lake.open(tmp_path) as lake:
        counts = lake.row_counts()
        assert (counts["answer_sums"], counts["prompt_sums"]) == (3, 3)
        assert differing(lake) == []
