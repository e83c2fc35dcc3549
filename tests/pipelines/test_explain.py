"""The way of things in a small lake: found by a prefix, told whole, and true after maintenance."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest

from pipelines import ids
from pipelines.difference import difference
from pipelines.errors import LakeError, QueryError
from pipelines.explain import explain
from pipelines.ids import content_id
from pipelines.lake import Append, Lake, Replace
from pipelines.maintenance import maintain
from tests.pipelines.lake_rows import fill, rows, trajectory

ADA, BOB, EVE = (content_id("t", name, "north", 0) for name in ("ada", "bob", "eve"))
ADA_1 = content_id("t", "ada", "north", 1)
TRAINED = content_id("checkpoint", "two")


def group(key: object, snapshot: int) -> dict:
    members = [(ADA_1, "ada", 0), (BOB, "bob", 1)]
    return {
        "group_id": content_id("group", key),
        "prompt_id": content_id("prompt", "north"),
        "reference": ADA,
        "wrapper": "pretrain",
        "split": "train",
        "snapshot": snapshot,
        "candidates": [
            {"trajectory_id": key, "rank": rank, "policy_id": content_id("policy", policy)}
            | {"relation": "same" if rank == 0 else "sibling"}
            for key, policy, rank in members
        ],
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small lake, then groups, a checkpoint on them, and other groups in their place."""
    home = tmp_path_factory.mktemp("explain")
    with Lake.open(home) as lake:
        before = fill(lake)
        made = Replace("groups", rows("groups", group("a", before)), "true")
        shown = lake.publish("polar", "groups: 1", [made])
        checkpoint = {"checkpoint_id": TRAINED, "name": "pretrained", "stage": "pretrain"}
        checkpoint |= {"snapshot": shown, "configuration": '{"lr": 0.1}', "metrics": "{}"}
        checkpoint |= {"parent": content_id("checkpoint", "one"), "path": "checkpoints/x"}
        lake.publish("polar", "trained", [Append("checkpoints", rows("checkpoints", checkpoint))])
        lake.publish("polar", "no groups", [Replace("groups", [], "true")])
    return home


@pytest.fixture
def lake(home: Path):
    with Lake.open(home, read_only=True) as lake:
        yield lake


def test_a_trajectory_is_told_whole(lake: Lake):
    facts = explain(lake, ids.text(ADA)[:9].upper())
    assert facts == json.loads(json.dumps(facts))
    assert facts["trajectory"]["trajectory_id"] == ids.text(ADA)
    assert facts["policy"]["name"] == "ada"
    assert facts["prompt"]["text"] == "say north"
    assert facts["sampling"]["exact"] is None  # no seed: nothing was drawn here
    (cluster,) = facts["duplicates"]
    assert (cluster["scope"], cluster["kind"], cluster["size"]) == ("prompt", "near", 2)
    assert {row["label"]: row["pairs"] for row in facts["pairs"]} == {
        "same_policy": 1,
        "cross_policy": 1,
    }
    assert (facts["published"]["author"], facts["published"]["message"]) == (
        "tests",
        "a small lake",
    )
    (checkpoint,) = facts["checkpoints"]
    assert checkpoint["checkpoint_id"] == ids.text(TRAINED)
    assert [role["role"] for role in checkpoint["groups"]] == ["reference"]


def test_a_pair_is_told_with_its_rule(lake: Lake):
    facts = explain(lake, f"{ids.text(BOB)}:{ADA.hex()[:10]}")
    assert facts["pair"]["label"] == "cross_policy"
    assert facts["label rule"] == "samples of two different policies on one prompt"
    assert {side["policy"]["name"] for side in facts["trajectories"]} == {"ada", "bob"}
    (checkpoint,) = facts["checkpoints"]
    assert set(checkpoint["groups"][0]["role"].split(", ")) == {"reference", "candidate of rank 1"}


def test_a_checkpoint_is_told_with_what_it_read(lake: Lake):
    facts = explain(lake, TRAINED.hex())
    assert facts["checkpoint"]["configuration"] == {"lr": 0.1}
    assert [row["name"] for row in facts["parents"]] == ["rm"]
    assert facts["read"]["message"] == "groups: 1"
    assert [row["groups"] for row in facts["groups"]] == [1]
    assert {row["name"]: row["trajectories"] for row in facts["policies"]} == {"ada": 2, "bob": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no such", "is no id: give at least 3 hex digits"),
        ("ab", "is no id"),
        ("000000000000", "no trajectory and no checkpoint begins with '000000000000'"),
        (f"{ADA.hex()}:{content_id('t', 'ada', 'south', 0).hex()}", "answer different prompts"),
        (f"{ADA.hex()}:{ADA.hex()}", "they are one trajectory"),
        (f"{BOB.hex()}:{ADA_1.hex()}", "the budget of `pairs` left it out"),
        (f"{EVE.hex()}:{ADA.hex()}", "one policy is held out and the other is not"),
        (f"{TRAINED.hex()}:{ADA.hex()}", "no trajectory begins with"),
    ],
)
def test_what_names_nothing_is_an_error(lake: Lake, given: str, message: str):
    with pytest.raises(QueryError, match=message):
        explain(lake, given)


def test_the_rule_that_kept_a_pair_out_is_named(tmp_path: Path):
    drawn = [
        {"sampling_id": content_id("sampling", n)} | trajectory("ada", "north", n + 2)
        for n in (0, 1)
    ]
    nameless = {"policy_id": content_id("policy", "?"), "name": "unknown:world", "source": "world"}
    theirs = trajectory("?", "north", 0, "a text without author")
    gone = [trajectory("ada", "gone", n) for n in (0, 1)]
    pairs = {
        "unknown": (theirs["trajectory_id"], ADA, "of a policy that is not known"),
        "sampling": (*(row["trajectory_id"] for row in drawn), "drawn in different ways"),
        "gone": (*(row["trajectory_id"] for row in gone), "is not in the lake any more"),
    }
    with Lake.open(tmp_path) as lake:
        fill(lake)
        lake.publish(
            "t",
            "more",
            [
                Append("policies", rows("policies", nameless)),
                Append("trajectories", rows("trajectories", *drawn, theirs, *gone)),
            ],
        )
        one, two, _ = pairs["sampling"]
        with pytest.raises(QueryError, match="the budget of `pairs` left it out"):
            explain(lake, f"{one.hex()}:{two.hex()}")  # where nothing says that it is required
        count = {"source": "world", "stage": "pairs", "what": "excluded", "reason": "sampling"}
        lake.publish("t", "counts", [Append("counts", rows("counts", count))])
        for one, two, message in pairs.values():
            with pytest.raises(QueryError, match=message):
                explain(lake, f"{one.hex()}:{two.hex()}")


def test_an_ambiguous_beginning_names_those_that_share_it(tmp_path: Path):
    with Lake.open(tmp_path) as lake:
        near = [bytes.fromhex("abcdef00" + f"{n:024x}") for n in (1, 2)]
        made = [
            {**trajectory("ada", "north", n), "trajectory_id": key} for n, key in enumerate(near)
        ]
        lake.publish("t", "two", [Append("trajectories", rows("trajectories", *made))])
        with pytest.raises(
            QueryError, match=r"ambiguous: abcdef00-.*1 \(traj.*2 \(traj.*add digits"
        ):
            explain(lake, "abcdef00")
        assert explain(lake, near[0].hex())["trajectory"]["sample_index"] == 0


def test_maintenance_changes_nothing_of_what_is_told(home: Path):
    with Lake.open(home) as lake:
        told = [explain(lake, key.hex()) for key in (ADA, TRAINED)]
        lake.publish("t", "b", [Append("groups", rows("groups", group("b", 1), group("c", 1)))])
        maintain(lake, timedelta(0))
        lake.publish("t", "-", [Replace("groups", [], "true")])
        maintain(lake, timedelta(0), keep=timedelta(0))
        again = [explain(lake, key.hex()) for key in (ADA, TRAINED)]
        assert told[0].pop("published")["snapshot"] == again[0]["published"]["snapshot"]
        assert again[0].pop("published")["message"] == "expired: nothing named it"
        assert again == told


def test_a_difference_tells_rows_policies_balance_and_duplicates(home: Path):
    with Lake.open(home) as lake:
        before = lake.snapshot()
        new = {"policy_id": content_id("policy", "zoe"), "name": "zoe", "source": "world"}
        more = [trajectory("zoe", "north", n) for n in (0, 1)]
        after = lake.publish(
            "t",
            "zoe",
            [
                Append("policies", rows("policies", new)),
                Append("trajectories", rows("trajectories", *more)),
                Replace("pairs", [], "label = 'cross_policy'"),
                Replace("duplicates", [], "true"),
            ],
        )
        facts = difference(lake, before, after)
        assert facts == json.loads(json.dumps(facts))
        assert facts["after"]["message"] == "zoe"
        tables = {row["table"]: row for row in facts["rows"]}
        assert tables.keys() == {"policies", "trajectories", "pairs", "duplicates"}
        assert tables["trajectories"] == {"table": "trajectories", "before": 12, "after": 14} | {
            "joined": 2,
            "left": 0,
        }
        assert facts["policies"] == [
            {"source": "world", "name": "zoe", "state": "joined"}
            | {"trajectories before": None, "trajectories after": 2}
        ]
        assert {
            (row["label"], row["pairs before"], row["pairs after"], row["share after"])
            for row in facts["balance"]
        } == {("cross_policy", 1, None, None), ("same_policy", 1, 1, 1.0)}
        assert facts["duplicates"] == [
            {"scope": "prompt", "kind": "near", "clusters before": 1, "clusters after": None}
            | {"members before": 2, "members after": None}
        ]
        back = difference(lake, after, before)
        assert [row["state"] for row in back["policies"]] == ["left"]
        none = difference(lake, after, after)
        assert not any(none[name] for name in ("rows", "policies", "balance", "duplicates"))
        with pytest.raises(LakeError, match="no snapshot 9999"):
            difference(lake, before, 9999)
