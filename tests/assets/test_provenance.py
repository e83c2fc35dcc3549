"""`polar explain` and `polar diff` on a home that went through every stage."""

from __future__ import annotations

import json

import pytest

from pipelines.errors import PolicyUnavailableError, QueryError
from pipelines.remake import remake
from tests.assets.conftest import Home
from tests.assets.homes import refused


def test_a_trajectory_is_made_again_from_the_printout(made: Home, polar):
    keys = made.query(
        "select trajectory_id::varchar as id, text from trajectories t join policies y "
        "using (policy_id) qualify row_number() over (partition by y.name order by hash(text)) = 1"
    )
    assert len(keys) == 6
    for row in keys[:3]:
        code, out, _ = polar("explain", row["id"][:13], "--json", home=made.path)
        assert code == 0
        facts = json.loads(out)
        assert facts["trajectory"]["text"] == row["text"]
        assert remake(facts, made.path / "policies") == row["text"]
    other = {**facts, "trajectory": {**facts["trajectory"], "seed": 1}}
    assert remake(other, made.path / "policies") != row["text"]


def test_again_compares_the_texts(made: Home, polar):
    key = made.one("select max(trajectory_id)::varchar as id from trajectories")
    code, out, _ = polar("explain", key, "--again", home=made.path)
    assert code == 0
    for words in (
        "made again:",
        "same yes",
        "seed: ",
        "revision: ",
        "engine_version: ",
        "policy:",
    ):
        assert words in out


def test_what_cannot_be_made_again_is_said(made: Home, polar):
    facts = {"kind": "trajectory", "trajectory": {"engine": "vllm"}}
    with pytest.raises(QueryError, match="this is engine vllm"):
        remake(facts, made.path)
    code, out, _ = polar(
        "explain",
        made.one("select checkpoint_id::varchar from checkpoints where name = 'finetuned'"),
        "--json",
        home=made.path,
    )
    facts = json.loads(out)
    assert code == 0
    with pytest.raises(QueryError, match="this is a checkpoint"):
        remake(facts, made.path)
    key = made.one("select max(trajectory_id)::varchar as id from trajectories")
    facts = json.loads(polar("explain", key, "--json", home=made.path)[1])
    with pytest.raises(PolicyUnavailableError, match="no folder under .* holds weights"):
        remake(facts, made.path / "groups")


def test_checkpoints_and_trajectories_know_each_other(made: Home, polar):
    key = made.one(
        "select max(reference)::varchar as id from groups where wrapper = 'pretrain' "
        "and split = 'train'"
    )
    facts = json.loads(polar("explain", key, "--json", home=made.path)[1])
    names = {checkpoint["name"] for checkpoint in facts["checkpoints"]}
    assert {"backbone", "pretrained"} <= names
    trained = next(c for c in facts["checkpoints"] if c["name"] == "pretrained")
    told = json.loads(polar("explain", trained["checkpoint_id"], "--json", home=made.path)[1])
    assert facts["policy"]["name"] in {policy["name"] for policy in told["policies"]}
    groups = {
        (g["wrapper"], g["split"]): g["groups"] for g in told["groups"] if g["cell"] == "seen"
    }
    assert groups["pretrain", "train"] == made.one(
        "select count(*) from groups where wrapper = 'pretrain' and split = 'train'"
    )
    assert told["read"]["message"].startswith("groups: ")
    pair = made.query(
        "select trajectory_a::varchar as a, trajectory_b::varchar as b from pairs limit 1"
    )
    code, out, _ = polar("explain", f"{pair[0]['b']}:{pair[0]['a']}", home=made.path)
    assert code == 0
    assert "label rule: " in out


def test_a_difference_of_two_snapshots(made: Home, polar):
    first = (
        made.one(
            "select min(snapshot_id) from lake.snapshots() "
            "where commit_message like 'trajectories of %'"
        )
        - 1
    )
    code, out, _ = polar("diff", str(first), "--json", home=made.path)
    assert code == 0
    facts = json.loads(out)
    rows = {row["table"]: row for row in facts["rows"]}
    assert rows["trajectories"]["joined"] == made.one("select count(*) from trajectories")
    code, out, _ = polar("diff", str(first), home=made.path)
    assert "same_policy" in out
    refused(polar("diff", "99999", home=made.path), "there is no snapshot 99999")
    refused(polar("explain", "no", home=made.path), "is no id")
