"""What a run makes again, and why: only what changed and what depends on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from assets.digests import code_digest
from pipelines.lake import Append, Replace
from tests.assets.homes import Home, Watch, stray_pair
from tests.pipelines.lake_rows import rows

TRAINED = ("backbone", "pretrained", "finetuned", "finetuned_alone", "report")
POLICIES = ("school-early", "school", "ash", "beech", "cork", "date")
ANSWERS = tuple(f"trajectories: {name}" for name in POLICIES)
SECTIONS = {
    "evaluation": ({"resamples": 101}, ["report"], []),
    "finetune": ({"max_steps": 5}, ["finetuned", "finetuned_alone"], ["report"]),
    "pretrain": ({"max_steps": 7}, ["pretrained"], ["finetuned", "report"]),
    "backbone": ({"max_documents": 199}, ["backbone"], TRAINED[1:]),
    "groups": ({"rounds": 2}, ["groups"], TRAINED),
    "preferences": ({"seed": 1}, ["preferences"], ["groups", *TRAINED]),
    "pairs": ({"require_same_sampling": False}, ["pairs", "groups"], TRAINED),
    "dedup": ({"threshold": 0.9}, ["duplicates"], ["pairs", "groups", *TRAINED]),
    "rollouts": (
        {"samples": 4},
        ANSWERS,
        ["preferences", "duplicates", "pairs", "groups", *TRAINED],
    ),
    "prompts": (
        {"prefixes": 5},
        ["prompts"],
        [*ANSWERS, "preferences", "duplicates", "pairs", "groups", *TRAINED],
    ),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_changed_setting_names_its_stage_and_what_follows(
    made: Home, tmp_path: Path, section: str
):
    change, stale, follows = SECTIONS[section]
    home = with_config(made, tmp_path)
    home.edit("run.yaml", **{section: change})
    plan = home.plan()
    assert {name: plan[name] for name in stale} == dict.fromkeys(stale, "changed: settings")
    after = set(plan) - set(stale)
    assert after == set(follows)
    for name in after:
        assert plan[name].startswith("after: ")


def with_config(made: Home, folder: Path) -> Home:
    """The made home with a configuration of its own; for looking only."""
    for file in made.config.parent.glob("*.yaml"):
        shutil.copy(file, folder / file.name)
    return Home(made.path, folder / "run.yaml")


def test_comments_and_names_of_files_change_nothing(made: Home, tmp_path: Path):
    home = with_config(made, tmp_path)
    text = home.config.read_text(encoding="utf-8")
    home.config.write_text(f"# Another word.\n{text}", encoding="utf-8")
    (tmp_path / "pool.yaml").rename(tmp_path / "other.yaml")
    home.edit("run.yaml", pool="other.yaml")
    assert home.plan() == {}


def test_only_what_changed_is_made(copy: Home):
    copy.edit("run.yaml", evaluation={"resamples": 120})
    runs = copy.dagster_runs()
    watch = Watch()
    outcome = copy.run(listener=watch)
    assert [(item.title, item.reason) for item in outcome.made] == [("report", "changed: settings")]
    assert watch.finished == [("report", None)]
    assert copy.dagster_runs() == runs + 1
    assert copy.plan() == {}


def add_policy(home: Home, **changes: Any) -> None:
    """A policy that asks the weights of `beech` in other words."""
    pool = yaml.safe_load((home.config.parent / "pool.yaml").read_text(encoding="utf-8"))
    beech = {"name": "beech-plain", "kind": "chat", "weights": "beech", "template": "{prompt} "}
    pool["policies"].append({**beech, "split": "train", **changes})
    home.edit("pool.yaml", policies=pool["policies"])


def answers(home: Home) -> dict[str, tuple[int, str]]:
    """Per policy id: how many answers, and a digest of them all."""
    found = home.query(
        "select policy_id::varchar as p, count(*) as n, "
        "md5(string_agg(trajectory_id::varchar || text || created_at::varchar, '' "
        "order by trajectory_id)) as d from trajectories group by 1"
    )
    return {row["p"]: (row["n"], row["d"]) for row in found}


def materialised(home: Home, partition: str) -> int:
    with home.instance() as instance:
        records = dg.AssetRecordsFilter(
            asset_key=dg.AssetKey("trajectories"), asset_partitions=[partition]
        )
        return len(instance.fetch_materializations(records, limit=10).records)


@pytest.mark.slow
def test_a_policy_that_joins_makes_only_its_own_answers(copy: Home):
    before = answers(copy)
    add_policy(copy)
    plan = copy.plan("pairs")
    assert plan["policies"] == "changed: weights, settings"
    assert plan["trajectories: beech-plain"] == "policy not registered yet"
    assert not set(ANSWERS) & set(plan)
    outcome = copy.run("pairs")
    made = [item.title for item in outcome.made]
    assert made == ["policies", "trajectories: beech-plain", "duplicates", "pairs"]
    after = answers(copy)
    assert {key: after[key] for key in before} == before
    ((new, _),) = [after[key] for key in set(after) - set(before)]
    assert new == next(iter(before.values()))[0]
    assert [materialised(copy, name) for name in (*POLICIES, "beech-plain")] == [1] * 7
    assert copy.plan("pairs") == {}
    assert set(copy.plan()) == {"preferences", "groups", *TRAINED}


def other_configuration(home: Home, **changes: Any) -> Home:
    """A second configuration of the same pool in the same home."""
    path = home.config.with_name("other.yaml")
    shutil.copy(home.config, path)
    other = Home(home.path, path)
    other.edit("other.yaml", name="other", **changes)
    return other


@pytest.mark.slow
def test_answers_that_went_with_their_prompts_are_made_again_when_those_come_back(copy: Home):
    before = answers(copy)
    copy.edit("run.yaml", prompts={"wordings": 1})
    assert [item.title for item in copy.run("prompts").made] == ["prompts"]
    outcome = copy.run("groups")  # their pairs, judgements and groups go too
    assert outcome.ok, outcome.failed
    fewer = answers(copy)
    assert sum(n for n, _ in fewer.values()) < sum(n for n, _ in before.values())
    copy.edit("run.yaml", prompts={"wordings": 2})
    assert copy.run("pairs").ok
    assert {key: n for key, (n, _) in answers(copy).items()} == {
        key: n for key, (n, _) in before.items()
    }
    assert copy.plan("pairs") == {}


@pytest.mark.slow
def test_answers_of_another_configuration_are_not_removed(copy: Home):
    before = answers(copy)
    other = other_configuration(copy, prompts={"wordings": 1})
    outcome = other.run("prompts")
    ((_, said),) = outcome.failed
    total = sum(n for n, _ in before.values())
    assert "asks the pool 'tiny' other prompts" in said
    assert "POLAR_HOME" in said
    assert answers(copy) == before
    assert 0 < int(said.split("whose ")[1].split()[0].replace(",", "")) < total
    assert copy.plan() == {}


@pytest.mark.slow
def test_rows_that_another_configuration_made_are_made_again(copy: Home):
    pairs = copy.query("from pairs order by all")
    other = other_configuration(copy, pairs={"require_same_sampling": False})
    assert other.run("pairs").ok
    assert copy.plan("pairs") == {"pairs": "replaced by the configuration 'other'"}
    assert copy.run("pairs").ok
    assert copy.query("from pairs order by all") == pairs
    assert other.plan("pairs")["pairs"].startswith("replaced by the configuration")


@pytest.mark.slow
def test_changed_weights_are_another_policy(copy: Home):
    from safetensors.torch import load_file, save_file

    before = answers(copy)
    file = copy.path / "policies" / "date" / "model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    save_file({**weights, name: weights[name] * 1.5}, file, {"format": "pt"})
    assert copy.plan("trajectories") == {
        "policies": "changed: weights",
        "trajectories: date": "policy not registered yet",
    }
    made = [item.title for item in copy.run("trajectories").made]
    assert made == ["policies", "trajectories: date"]
    ids = copy.query("select policy_id::varchar as p from policies where name = 'date'")
    assert len(ids) == 2
    after = answers(copy)
    assert {key: after[key] for key in before} == before
    assert {row["p"] for row in ids} == {
        *(set(after) - set(before)),
        *(set(before) & {row["p"] for row in ids}),
    }
    assert copy.plan("trajectories") == {}


@pytest.mark.slow
def test_a_policy_that_left_changes_sides_with_its_group(copy: Home):
    pool = yaml.safe_load((copy.config.parent / "pool.yaml").read_text(encoding="utf-8"))
    (date,) = [policy for policy in pool["policies"] if policy["name"] == "date"]
    date.update(split="train", template="{prompt}\n\n")
    copy.edit("pool.yaml", policies=pool["policies"])
    outcome = copy.run("policies")
    assert outcome.ok, outcome.failed
    dates = copy.query("select split, template from policies where name = 'date'")
    assert sorted(row["template"] for row in dates) == ["{prompt}\n", "{prompt}\n\n"]
    assert {row["split"] for row in dates} == {"train"}
    assert copy.one("select split from policies where name = 'cork'") == "test"


def test_a_deleted_checkpoint_is_trained_again(copy: Home):
    row = copy.query("from checkpoints where name = 'finetuned'")
    shutil.rmtree(copy.path / "checkpoints" / "tiny" / "finetuned")
    assert copy.plan()["finetuned"] == "missing: checkpoints/tiny/finetuned/config.json"
    assert [item.title for item in copy.run().made] == ["finetuned"]
    again = copy.query("from checkpoints where name = 'finetuned'")
    assert [r["checkpoint_id"] for r in again] == [r["checkpoint_id"] for r in row]
    assert copy.plan() == {}


def test_files_between_stages_that_are_deleted_are_made_again(made: Home, copy: Home):
    shutil.rmtree(copy.path / "staging")
    assert copy.plan("pairs") == {
        "duplicates": "missing: staging/tiny/dedup-index/signatures",
        "pairs": "after: duplicates",
    }
    assert [item.title for item in copy.run().made] == ["duplicates"]  # as it was
    same = "from duplicates order by all"
    assert copy.query(same) == made.query(same)


@pytest.mark.slow
def test_deleted_weights_of_the_pool_are_trained_again(copy: Home):
    before = answers(copy)
    shutil.rmtree(copy.path / "policies" / "cork")
    assert copy.plan("trajectories")["embedded_policies"] == "missing: policies/cork"
    made = [item.title for item in copy.run("trajectories").made]
    assert made == ["embedded_policies"]  # the same weights are the same policy
    assert answers(copy) == before


# --- blocking checks --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failed_check_stops_what_depends_on_it_until_it_is_mended(copy: Home):
    copy.publish(*stray_pair())
    assert copy.plan() == {}  # nobody looked yet
    copy.edit("run.yaml", pairs={"require_same_sampling": False})
    for reason in ("changed: settings", "check failed: references_resolve, summed"):
        outcome = copy.run("groups")
        assert outcome.stopped == "pairs"
        assert not outcome.made
        ((item, error),) = outcome.failed
        assert (item.title, item.reason) == ("pairs", reason)
        assert "references_resolve on pairs failed" in error
        assert "trajectory_a" in error
        assert "61616161-6161-6161-6161-616161616161" in error
    assert copy.plan()["groups"].startswith("changed: settings")
    copy.publish(Replace("pairs", rows("pairs"), "trajectory_a = repeat('61', 16)::uuid"))
    assert [item.title for item in copy.run("groups").made] == ["pairs", "groups"]


def test_a_policy_may_have_an_apostrophe_in_its_name(copy: Home):
    add_policy(copy, name="o'beech")
    assert copy.run("trajectories").ok
    assert copy.plan("trajectories") == {}
    assert copy.one("select count(*) from counts where label = 'o''beech' and what = 'out'") > 0


def test_a_failed_check_on_one_policys_answers_stops_the_run(copy: Home):
    stray = {"trajectory_id": b"t" * 16, "prompt_id": b"p" * 16, "policy_id": b"q" * 16}
    copy.publish(Append("trajectories", rows("trajectories", stray)))
    add_policy(copy)
    outcome = copy.run()
    assert outcome.stopped == "trajectories: beech-plain"
    assert [item.title for item in outcome.made] == ["policies"]
    assert "references_resolve" in outcome.failed[0][1]


def test_a_stage_whose_checks_did_not_run_is_not_current(copy: Home):
    """As when the process is killed between making and checking."""
    from assets import pool

    workspace = copy.workspace()
    with copy.instance() as instance:
        result = dg.materialize(
            pool.ASSETS,
            selection="prompts",
            instance=instance,
            resources={"workspace": dg.ResourceDefinition.hardcoded_resource(workspace)},
        )
        assert result.success
    assert copy.plan("prompts") == {"prompts": "check failed: keys_unique, one_side"}
    assert [item.title for item in copy.run("prompts").made] == ["prompts"]
    assert copy.plan() == {}


# --- code -------------------------------------------------------------------------------------


def test_code_is_its_syntax_with_all_that_it_imports(tmp_path: Path, monkeypatch):
    from assets import digests

    def digest(files: dict[str, str]) -> str:
        code_digest.cache_clear()
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return code_digest(("pipelines.one",))

    monkeypatch.setattr(digests, "PROJECT", tmp_path)
    files = {
        "pipelines/one.py": '"""One."""\nfrom pipelines import two\n\ndef f():\n    """F."""\n',
        "pipelines/two.py": "from pipelines.deep.three import g\n",
        "pipelines/deep/__init__.py": "",
        "pipelines/deep/three.py": "def g():\n    return 1\n",
        "pipelines/other.py": "x = 1\n",
    }
    try:
        first = digest(files)
        said = '"""Uno."""  # a comment\nfrom pipelines import two\n\n\ndef f():\n    """G."""\n'
        assert digest({"pipelines/one.py": said}) == first
        assert digest({"pipelines/other.py": "x = 2\n"}) == first
        assert digest({"pipelines/deep/three.py": "def g():\n    return 2\n"}) != first
    finally:
        code_digest.cache_clear()
