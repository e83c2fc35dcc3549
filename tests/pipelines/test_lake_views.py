"""The views' answers on a small lake, the ten queries, and the generated page."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from pipelines import ids, lake_docs
from pipelines.ids import content_id
from pipelines.lake import Append, Lake, Replace
from pipelines.queries import QUERIES
from pipelines.views import VIEWS
from tests.pipelines.lake_rows import fill, rows, small_lake, trajectory


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory):
    with Lake.open(tmp_path_factory.mktemp("lake")) as lake:
        fill(lake)
        yield lake


@pytest.fixture
def changed(lake: Lake):
    """The lake, put back as it was after the test."""
    yield lake
    lake.publish("tests", "put back", [Replace(c.table, c.data, "true") for c in small_lake()])


def test_triples_are_the_ordered_couples_of_each_group(changed: Lake):
    def candidate(name: str, rank: int) -> dict:
        trajectory_id = content_id("t", name)
        return {"trajectory_id": trajectory_id, "policy_id": content_id("p"), "rank": rank} | {
            "relation": f"relation of {name}"
        }

    candidates = [candidate("c", 1), candidate("a", 0), candidate("d", 1), candidate("e", 2)]
    group = {"group_id": content_id("g"), "candidates": candidates}
    changed.publish("tests", "m", [Replace("groups", rows("groups", group), "true")])
    found = changed.query("from triples").to_pylist()
    names = {ids.text(content_id("t", name)): name for name in "acde"}
    couples = {names[str(t["positive"])] + names[str(t["negative"])] for t in found}
    assert couples == {"ac", "ad", "ae", "ce", "de"}
    assert len(found) == 5
    assert all(t["relation"] == f"relation of {names[str(t['negative'])]}" for t in found)


def test_pool_overview_counts_and_shares(changed: Lake):
    flagged = [
        trajectory("ada", "north", 2, "") | {"flags": ["empty"], "correct": False, "tokens": 0},
        trajectory("ada", "north", 3, "la la la") | {"flags": ["loop", "truncated"]}
        | {"correct": True, "tokens": 4},
    ]  # fmt: skip
    changed.publish("tests", "m", [Append("trajectories", rows("trajectories", *flagged))])
    pool = {row["name"]: row for row in changed.query("from pool_overview").to_pylist()}
    ada, bob = pool["ada"], pool["bob"]
    assert (ada["prompts"], ada["trajectories"]) == (2, 6)
    assert (ada["empty"], ada["loop"], ada["truncated"]) == pytest.approx((1 / 6, 1 / 6, 1 / 6))
    assert ada["repeated"] == pytest.approx(2 / 6)
    assert (ada["correct"], ada["mean_tokens"]) == (0.5, 2.0)
    assert (bob["trajectories"], bob["repeated"], bob["correct"]) == (4, 0, None)


def test_pool_overview_shows_a_policy_without_answers(changed: Lake):
    idle = {"policy_id": content_id("policy", "idle"), "name": "idle"}
    changed.publish("tests", "m", [Append("policies", rows("policies", idle))])
    (row,) = changed.query("from pool_overview where name = 'idle'").to_pylist()
    assert (row["prompts"], row["trajectories"], row["repeated"]) == (0, 0, None)
    assert row["mean_characters"] is row["empty"] is None


def test_pair_balance(lake: Lake):
    balance = lake.query("from pair_balance order by split, label").to_pylist()
    found = [
        (b["source"], b["split"], b["cell"], b["label"], b["pairs"], b["share"]) for b in balance
    ]
    assert found == [
        ("world", "eval", "both_new", "same_policy", 1, 1.0),
        ("world", "train", "seen", "cross_policy", 1, 0.5),
        ("world", "train", "seen", "same_policy", 1, 0.5),
    ]
    assert [b["mean_similarity"] for b in balance] == [0.5] * 3


def test_preference_by_category(changed: Lake):
    def preference(number: int, chosen: int, rejected: int, **more) -> dict:
        return more | {
            "preference_id": content_id("p", number),
            "chosen": content_id("t", "ada", "north", chosen),
            "rejected": content_id("t", "ada", "north", rejected),
        }

    judged = [
        preference(1, 1, 0, category="maths", reference=content_id("t", "bob", "north", 0)),
        preference(2, 0, 1, category="maths", strength=3.0),
        preference(3, 1, 1, category="maths"),
        preference(4, 1, 0),
    ]
    changed.publish("tests", "m", [Replace("preferences", rows("preferences", *judged), "true")])
    found = {
        row["category"]: row for row in changed.query("from preference_by_category").to_pylist()
    }
    assert found["maths"]["preferences"] == 3
    assert found["maths"]["longer_chosen"] == 0.5
    assert found["maths"]["with_reference"] == pytest.approx(1 / 3)
    assert found["maths"]["mean_strength"] == 3.0
    assert found["none"]["longer_chosen"] == 1.0


def test_a_sound_lake_leaks_nothing(lake: Lake):
    assert lake.query("from leakage").to_pylist() == []


LEAKS = {
    "a prompt group on both sides": [
        Append("prompts", rows("prompts", {"prompt_group": "north", "split": "test"}))
    ],
    "a policy group on both sides": [
        Append("policies", rows("policies", {"policy_group": "first", "split": "test"}))
    ],
    "a train preference on a test prompt": [
        Append(
            "preferences",
            rows("preferences", {"prompt_id": content_id("prompt", "south"), "split": "train"}),
        )
    ],
}


def _pair(one: tuple, two: tuple, split: str, cell: str) -> list[Append]:
    pair = {"trajectory_a": content_id("t", *one), "trajectory_b": content_id("t", *two)}
    return [Append("pairs", rows("pairs", pair | {"split": split, "cell": cell}))]


def _group(members: list[tuple], split: str, cell: str, wrapper: str = "pretrain") -> list[Append]:
    reference, *others = [content_id("t", *member) for member in members]
    candidates = [
        {"trajectory_id": one, "policy_id": bytes(16), "rank": rank, "relation": "same"}
        for rank, one in enumerate(others)
    ]
    group = {"group_id": content_id("new"), "reference": reference, "candidates": candidates}
    named = {"split": split, "cell": cell, "wrapper": wrapper}
    return [Append("groups", rows("groups", group | named))]


OUTSIDE = "a group outside its split or cell"
ADA, BOB, EVE = (("ada", "north", 1), ("bob", "north", 1), ("eve", "north", 1))
UNKNOWN = ("unknown:world", "north", 0)
UNNAMED = [
    Append("trajectories", rows("trajectories", trajectory(*UNKNOWN))),
    Append(
        "policies",
        rows(
            "policies",
            {"policy_id": content_id("policy", UNKNOWN[0]), "name": UNKNOWN[0], "split": "test"},
        ),
    ),
]
ADA_SOUTH, EVE_SOUTH = ("ada", "south", 1), ("eve", "south", 1)


@pytest.mark.parametrize("rule", LEAKS)
def test_each_leak_is_named(changed: Lake, rule: str):
    changed.publish("tests", "leak", LEAKS[rule])
    assert {row["rule"] for row in changed.query("from leakage").to_pylist()} == {rule}


@pytest.mark.parametrize(
    ("changes", "leaks"),
    [
        (_pair(ADA, BOB, "train", "seen"), False),
        (_pair(ADA, BOB, "eval", "seen"), False),
        (_pair(EVE, EVE, "eval", "new_policy"), False),
        (_pair(ADA_SOUTH, ADA_SOUTH, "eval", "new_prompt"), False),
        (_pair(ADA, EVE, "eval", "new_policy"), True),
        (_pair(ADA_SOUTH, ADA_SOUTH, "train", "new_prompt"), True),
        (_pair(ADA_SOUTH, ADA_SOUTH, "train", "seen"), True),
        (_pair(EVE, EVE, "eval", "seen"), True),
    ],
)
def test_a_pair_belongs_to_the_cell_of_its_sides(changed: Lake, changes: list, leaks: bool):
    changed.publish("tests", "pair", changes)
    found = {row["rule"] for row in changed.query("from leakage").to_pylist()}
    assert found == ({"a pair outside its split or cell"} if leaks else set())


@pytest.mark.parametrize(
    ("changes", "leaks"),
    [
        (_group([ADA, ADA, BOB], "train", "seen"), set()),
        (_group([EVE, EVE], "eval", "new_policy"), set()),
        (_group([EVE_SOUTH, EVE_SOUTH], "eval", "both_new"), set()),
        (_group([ADA, ADA, EVE], "train", "seen"), {OUTSIDE}),
        (_group([EVE, EVE], "train", "seen"), {OUTSIDE}),
        (_group([ADA_SOUTH, ADA_SOUTH], "train", "new_prompt"), {OUTSIDE}),
        (_group([ADA, ADA, EVE], "train", "seen", "sft"), {OUTSIDE}),
        (_group([("ada", "north", 0), ADA, BOB], "train", "seen", "sft"), set()),
        (UNNAMED + _group([UNKNOWN, ADA, UNKNOWN], "train", "seen", "sft"), set()),
        (UNNAMED + _group([UNKNOWN, EVE, UNKNOWN], "eval", "new_policy", "sft"), set()),
        (UNNAMED + _group([UNKNOWN, UNKNOWN], "train", "seen", "sft"), set()),
        (UNNAMED + _group([UNKNOWN, EVE, UNKNOWN], "train", "seen", "sft"), {OUTSIDE}),
        (
            _group([("ada", "north", 0), ADA, BOB], "eval", "seen"),
            {"a reference in train and eval groups"},
        ),
    ],
)  # fmt: skip
def test_a_group_belongs_to_the_cell_of_its_members(changed: Lake, changes: list, leaks: set):
    changed.publish("tests", "group", changes)
    assert {row["rule"] for row in changed.query("from leakage").to_pylist()} == leaks


def test_there_are_ten_queries_and_five_views():
    assert len({query.name for query in QUERIES}) == 10
    assert len(VIEWS) == 5


EMPTY_WHEN_SOUND = {"leaks"}


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_each_query_runs_and_answers(lake: Lake, query):
    found = lake.query(query.sql)
    assert (len(found) == 0) == (query.name in EMPTY_WHEN_SOUND)


def test_results_are_shown_beside_the_best_ruler(lake: Lake):
    (query,) = [query for query in QUERIES if query.name == "results"]
    (row,) = lake.query(query.sql).to_pylist()
    assert (row["model"], row["low"], row["high"]) == (0.8, 0.7, 0.9)
    assert (row["best_ruler"], row["ruler"]) == (0.6, "length")


def test_the_page_is_current():
    assert lake_docs.PAGE.read_text(encoding="utf-8") == lake_docs.page(), (
        "docs/lake.md is behind the schemas: python -m pipelines.lake_docs"
    )


def test_the_python_lines_of_the_page_work(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "var").symlink_to(lake.home)
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(lake_docs.PYTHON, {})
    assert "pool_overview" in lake_docs.SHELL
    assert "policy_group" in printed.getvalue()
