"""Each check passes on a good lake and fails on a doctored one, naming the row."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assets.checks import all_checks, check_keys
from assets.workspace import Workspace
from pipelines.lake import Append, Change, Lake, Replace
from tests.assets.homes import Home
from tests.pipelines.lake_rows import content_id, fill, rows, small_lake, trajectory

P, Q = b"p" * 16, b"q" * 16
WRITTEN = "70707070-7070-7070-7070-707070707070"
BOB = [content_id("t", "bob", "north", index) for index in (0, 1)]
ROW: dict[str, dict[str, Any]] = {
    "policies": {"policy_id": P, "name": "p", "policy_group": "p", "split": "train"},
    "prompts": {"prompt_id": P, "prompt_group": "p", "source": "world", "split": "train"},
    "trajectories": trajectory("ada", "north", 7) | {"trajectory_id": P},
    "duplicates": {"trajectory_id": content_id("t", "ada", "north", 0), "scope": "corpus"},
    "pairs": {
        "trajectory_a": min(BOB),
        "trajectory_b": max(BOB),
        "prompt_id": content_id("prompt", "north"),
        "label": "same_policy",
        "relation": "same",
        "split": "train",
        "cell": "seen",
    },
    "preferences": {
        "preference_id": P,
        "prompt_id": content_id("prompt", "north"),
        "chosen": content_id("t", "ada", "north", 0),
        "rejected": content_id("t", "ada", "north", 1),
        "split": "train",
    },
    "groups": {
        "group_id": P,
        "prompt_id": content_id("prompt", "north"),
        "reference": content_id("t", "ada", "north", 0),
        "wrapper": "pretrain",
        "split": "train",
        "cell": "seen",
        "candidates": [],
    },
}


def add(table: str, **changes: Any) -> list[Change]:
    return [Append(table, rows(table, ROW[table] | changes))]


def twice(table: str) -> list[Change]:
    return [Append(table, rows(table, ROW[table], ROW[table]))]


def uncounted(stage: str) -> list[Change]:
    count = {"stage": stage, "what": "in", "rows": 5, "source": "astray"}
    return [Append("counts", rows("counts", count))]


def candidate(policy: str, prompt: str) -> dict[str, Any]:
    return {
        "trajectory_id": content_id("t", policy, prompt, 0),
        "policy_id": content_id("policy", policy),
        "rank": 0,
        "relation": "same",
    }


# (asset, check) -> a change for the worse, and what the verdict must name
BAD: dict[tuple[str, str], tuple[list[Change], str]] = {
    **{(table, "keys_unique"): (twice(table), "times=2") for table in ROW},
    ("policies", "one_side"): (add("policies", policy_group="first", split="test"), "first"),
    ("prompts", "one_side"): (add("prompts", prompt_group="north", split="test"), "north"),
    ("trajectories", "references_resolve"): (add("trajectories", prompt_id=P), WRITTEN),
    ("trajectories", "nothing_lost"): (uncounted("rollouts"), "astray"),
    ("trajectories", "summed"): (add("trajectories", policy_id=P), "answers=1"),
    ("duplicates", "references_resolve"): (add("duplicates", trajectory_id=P), WRITTEN),
    ("duplicates", "nothing_lost"): (uncounted("dedup"), "astray"),
    ("pairs", "references_resolve"): (add("pairs", prompt_id=P), WRITTEN),
    ("pairs", "ordered"): (add("pairs", trajectory_a=Q, trajectory_b=P), WRITTEN),
    ("pairs", "no_leak"): (add("pairs", cell="both_new", split="eval"), "cell"),
    ("pairs", "summed"): (add("pairs"), "summed=1"),
    ("pairs", "nothing_lost"): (uncounted("pairs"), "astray"),
    ("preferences", "references_resolve"): (add("preferences", chosen=P), WRITTEN),
    ("groups", "references_resolve"): (add("groups", reference=P), WRITTEN),
    ("groups", "no_leak"): (
        add("groups", candidates=[candidate("eve", "north")]),
        WRITTEN,
    ),
}
GROUPS = {("groups", "reference_blind"), ("pairs", "label_shares")}
FINITE = {(name, "finite") for name in ("backbone", "pretrained", "finetuned", "finetuned_alone")}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small lake with something in every table, and counts that balance."""
    home = tmp_path_factory.mktemp("good")
    with Lake.open(home) as lake:
        fill(lake)
        balanced = [
            {"stage": stage, "what": what, "rows": 3, "source": "world"}
            for stage in ("ingest", "rollouts", "dedup", "pairs")
            for what in ("in", "out")
        ]
        lake.publish("tests", "counts", [Replace("counts", rows("counts", *balanced), "true")])
    return home


def workspace_at(home: Path, made: Home) -> Workspace:
    return replace(made.workspace(), home=home, _reader=None)


def verdicts(workspace: Workspace, asset: str, names: set[str]) -> dict[str, dg.AssetCheckResult]:
    """What the checks of an asset say."""
    found: dict[str, dg.AssetCheckResult] = {}
    for check in all_checks():
        keys = {key.name for key in check.check_keys if key.asset_key.to_user_string() == asset}
        if not keys & names:
            continue
        result: Any = check(workspace)
        several = result if isinstance(result, Iterator | list) else [result]
        for verdict in several:
            name = verdict.check_name or next(iter(keys))
            found[name] = verdict
    return found


def said(verdict: dg.AssetCheckResult) -> str:
    return "\n".join(str(value.value) for value in verdict.metadata.values())


def test_every_check_is_tested():
    tested = set(BAD) | GROUPS | FINITE | {("trajectories", "samples_differ")}
    assert {(key.asset_key.to_user_string(), key.name) for key in check_keys()} == tested
    tables = {change.table for change in small_lake()}
    assert set(ROW) <= tables


@pytest.mark.parametrize(("asset", "name"), BAD, ids=str)
def test_a_bad_row_is_named(made: Home, good: Path, tmp_path: Path, asset: str, name: str):
    home = tmp_path / "home"
    shutil.copytree(good, home)
    changes, naming = BAD[asset, name]
    workspace = workspace_at(home, made)
    before = verdicts(workspace, asset, {name})[name]
    assert before.passed, said(before)
    with Lake.open(home) as lake:
        lake.publish("tests", "bad", changes)
    after = verdicts(workspace, asset, {name})[name]
    assert not after.passed
    assert naming in said(after)


def test_label_shares_out_of_bounds(made: Home, copy: Home):
    asset, name = "pairs", "label_shares"
    assert verdicts(made.workspace(), asset, {name})[name].passed
    out = {"stage": "pairs", "what": "out", "label": "same_policy", "reason": "", "split": "seen"}
    many = Append("counts", rows("counts", out | {"rows": 10**6, "source": "other"}))
    copy.publish(many)
    assert verdicts(copy.workspace(), asset, {name})[name].passed  # another configuration's
    copy.publish(Append("counts", rows("counts", out | {"rows": 10**6, "source": "tiny"})))
    verdict = verdicts(copy.workspace(), asset, {name})[name]
    assert not verdict.passed
    assert "split=train" in said(verdict)
    assert "share=0.9" in said(verdict)


def test_candidates_that_give_the_label_away(made: Home, copy: Home):
    asset, name = "groups", "reference_blind"
    assert verdicts(made.workspace(), asset, {name})[name].passed
    for split in ("train", "eval"):
        path = copy.path / "groups" / "tiny" / f"pretrain-{split}.parquet"
        table = pq.read_table(path)
        groups = table.to_pylist()
        for group in groups:
            for one in group["candidates"]:
                one["text"] += " indeed!" if one["rank"] == 0 else " no."
        pq.write_table(pa.Table.from_pylist(groups, table.schema), path)
    verdict = verdicts(copy.workspace(), asset, {name})[name]
    assert not verdict.passed
    assert "leaks=True" in said(verdict)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(made: Home, tmp_path: Path, value: float):
    from safetensors.torch import load_file, save_file

    asset, name = "pretrained", "finite"
    assert verdicts(made.workspace(), asset, {name})[name].passed
    weights = load_file(made.path / "checkpoints" / "tiny" / asset / "model.safetensors")
    bad = sorted(weights)[1]
    weights[bad].view(-1)[5] = value
    folder = tmp_path / "checkpoints" / "tiny" / asset
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    verdict = verdicts(workspace_at(tmp_path, made), asset, {name})[name]
    assert not verdict.passed
    assert bad in said(verdict)


def test_a_checkpoint_without_weights_does_not_pass(made: Home, tmp_path: Path):
    verdict = verdicts(workspace_at(tmp_path, made), "pretrained", {"finite"})["finite"]
    assert not verdict.passed


def test_samples_drawn_with_one_seed(made: Home, good: Path, tmp_path: Path):
    asset, name = "trajectories", "samples_differ"
    assert verdicts(made.workspace(), asset, {name})[name].passed
    home = tmp_path / "home"
    shutil.copytree(good, home)
    drawn = {"seed": 1, "temperature": 1.0}
    alike = [
        trajectory("ada", f"q{n}", i, f"one text {n}") | drawn for n in range(60) for i in (0, 1)
    ]
    apart = [
        trajectory("bob", f"q{n}", i, f"text {n} {i}") | drawn for n in range(60) for i in (0, 1)
    ]
    with Lake.open(home) as lake:
        lake.publish("tests", "apart", [Append("trajectories", rows("trajectories", *apart))])
        assert verdicts(workspace_at(home, made), asset, {name})[name].passed
        lake.publish("tests", "alike", [Append("trajectories", rows("trajectories", *alike))])
    verdict = verdicts(workspace_at(home, made), asset, {name})[name]
    assert not verdict.passed
    assert "name=ada" in said(verdict)
    assert "name=bob" not in said(verdict)
