"""Bad input where the user meets it: one message that says what, which value and what to do."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.lake import Lake
from tests.assets.homes import ENV, ROOT, TINY, Home, Watch, refused
from tests.assets.recorded_data import records


def test_an_unknown_key_is_answered_with_the_nearest(polar, fresh: Home):
    fresh.edit("run.yaml", rollouts={"sample": 2})
    refused(polar("run", "-c", str(fresh.config)), "run.yaml", "'rollouts.sample'", "'samples'")
    assert not fresh.path.exists()


def test_no_configuration_file_and_no_yaml(polar, tmp_path: Path):
    refused(polar("run", "-c", str(tmp_path / "no.yaml")), "no.yaml: no such configuration file")
    (tmp_path / "bad.yaml").write_text("a: [1", encoding="utf-8")
    refused(polar("run", "-c", str(tmp_path / "bad.yaml")), "bad.yaml: not valid YAML")


def test_two_policies_of_one_name(polar, fresh: Home):
    import yaml

    pool = yaml.safe_load((fresh.config.parent / "pool.yaml").read_text(encoding="utf-8"))
    pool["policies"].append(dict(pool["policies"][2]))
    fresh.edit("pool.yaml", policies=pool["policies"])
    message = "policies 3 and 7 are both named 'ash'; give each its own name"
    refused(polar("run", "-c", str(fresh.config)), "pool.yaml", message)
    refused(polar("run", "-c", str(fresh.config), "--dry-run"), message)
    assert not fresh.path.exists()


def test_a_recipe_that_cannot_be_meant(polar, fresh: Home):
    fresh.edit("pool.yaml", embedded={"runs": [{"name": "a", "start": "b"}]})
    refused(polar("run", "-c", str(fresh.config)), "pool.yaml: embedded", "starts from 'b'")


def test_an_unknown_asset(polar, fresh: Home):
    result = polar("run", "-c", str(fresh.config), "--until", "pair")
    refused(result, "tiny has no asset 'pair'; did you mean 'pairs'?")
    result = polar("run", "-c", str(fresh.config), "--until", "zzz")
    refused(result, "there are embedded_policies, policies, prompts")
    assert not (fresh.path / "lake").exists()


def test_data_that_is_missing_or_not_there_or_not_wanted(polar, fresh: Home, tmp_path: Path):
    recorded = str(ROOT / "configs" / "recorded.yaml")
    for more in ([], ["--dry-run"]):
        refused(polar("run", "-c", recorded, *more), "recorded.yaml", "--data FOLDER")
        gone = ["--data", str(tmp_path / "gone"), *more]
        refused(polar("run", "-c", recorded, *gone), f"{tmp_path}/gone", "no such file or folder")
    refused(polar("run", "-c", str(fresh.config), "-d", str(tmp_path)), "its own trajectories")


def test_parquet_with_a_wrong_type(polar, tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    home = records(tmp_path, tmp_path / "home")
    (tmp_path / "data" / "trajectories.jsonl").unlink()
    table = pa.table({"prompt": ["a"], "policy": [{"x": 1}], "response": ["b"]})
    pq.write_table(table, tmp_path / "data" / "trajectories.parquet")
    code, out, err = polar("run", "-c", str(home.config), "-d", str(home.data))
    assert code == 1, err
    assert "recorded" in out
    assert "trajectories.parquet" in out
    assert "policy" in out
    assert "Traceback" not in out + err
    assert '  File "' not in out


@pytest.mark.slow
def test_a_lake_locked_by_another_writer(polar, made: Home, tmp_path: Path):
    """The run says who has it, and that nothing was harmed; afterwards it goes on."""
    home = made.copy(tmp_path)
    home.edit("run.yaml", lake={"patience": 0.5}, prompts={"prefixes": 5})
    holder = (
        "import sqlite3, sys\n"
        "con = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "con.execute('begin immediate')\n"
        "print('got it', flush=True)\n"
        "sys.stdin.read()\n"
    )
    lock = [sys.executable, "-c", holder, str(home.path / "lake" / "catalog.sqlite")]
    arguments = ("run", "-c", str(home.config), "--until", "prompts")
    with subprocess.Popen(
        lock, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "got it\n"
        code, out, err = polar(*arguments, home=home.path)
        assert process.stdin is not None
        process.stdin.close()
    assert code == 1, err
    assert f"locked for writing by process {process.pid}" in out
    assert "The last snapshot is intact" in out
    assert "not made: prompts" in out
    code, out, err = polar(*arguments, home=home.path)
    assert code == 0, out + err
    assert home.one("select count(*) from prompts where kind = 'prefix'") == 5


def test_a_disk_that_fills_up_while_publishing(polar, made: Home, tmp_path: Path, monkeypatch):
    """No file may grow beyond 20 kB while a publish runs: as when there is no room left."""
    home = made.copy(tmp_path)
    home.edit("run.yaml", prompts={"prefixes": 3000})
    before = home.one("from lake.current_snapshot()")
    arguments = ("run", "-c", str(home.config), "--until", "prompts")
    publish = Lake.publish
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def cramped(*args: Any) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            return publish(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(Lake, "publish", cramped)
        code, out, err = polar(*arguments, home=home.path)
    assert code == 1, err
    assert "The last snapshot is intact: free space and run again" in out
    assert "not made: prompts" in out
    assert home.one("from lake.current_snapshot()") == before
    assert polar(*arguments, home=home.path)[0] == 0
    assert home.one("select count(*) from prompts where kind = 'prefix'") > 1000


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "polar.json is missing"),
    ],
)
def test_scoring_with_what_is_no_checkpoint(polar, tmp_path: Path, make, word: str):
    folder = tmp_path / "checkpoint"
    make(folder)
    items = tmp_path / "items.jsonl"
    items.write_text('{"prompt": "a", "reference": "b", "output": "c"}\n', encoding="utf-8")
    refused(polar("score", str(folder), "--input", str(items)), str(folder), word)


def test_scoring_bad_items(polar, made: Home, tmp_path: Path):
    folder = str(made.path / "checkpoints" / "tiny" / "finetuned")
    refused(polar("score", folder, "--input", str(tmp_path / "no.jsonl")), "no.jsonl")
    items = tmp_path / "items.jsonl"
    good = {"prompt": "a", "reference": "b", "output": "c"}
    bad = {"prompt": "a", "reference": "b"}
    items.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n", encoding="utf-8")
    refused(polar("score", folder, "--input", str(items)), "items.jsonl", "2", "output")
    backbone = str(made.path / "checkpoints" / "tiny" / "backbone")
    refused(polar("score", backbone, "--input", str(items)), "backbone")


def test_queries_that_write_or_are_wrong(polar, made: Home):
    refused(polar("sql", "drop table pairs", home=made.path), "refused: DROP", "only reads")
    refused(polar("sql", "select nothing", home=made.path), "nothing")
    refused(polar("sql", "from pairs", "--format", "xml"), "'xml'", "table, csv, json, parquet")
    refused(polar("sql", "from pairs", "--snapshot", "99999"), "99999")


def test_no_lake_yet(polar, tmp_path: Path):
    refused(polar("sql", "from pairs", home=tmp_path / "empty"), "no lake here", "make demo")
    refused(polar("similar", "text", "-c", str(TINY / "run.yaml")), "no lake here")


def test_an_unknown_option_or_command(polar):
    refused(polar("run", "--untill", "pairs"), "No such option: --untill")
    refused(polar("rum"), "No such command 'rum'")


@pytest.mark.slow
def test_a_policy_without_weights_is_reported_and_the_others_go_on(polar, copy: Home):
    import yaml

    pool = yaml.safe_load((copy.config.parent / "pool.yaml").read_text(encoding="utf-8"))
    gone = {"name": "gone", "kind": "chat", "weights": "nowhere", "split": "train"}
    copy.edit("pool.yaml", policies=[*pool["policies"], gone])
    arguments = ("run", "-c", str(copy.config), "--until", "pairs")
    code, out, err = polar(*arguments, home=copy.path)
    assert code == 0, out + err
    assert "policy gone could not answer: no folder" in out
    assert "policies/nowhere" in out
    assert copy.one("select count(distinct policy_id) from trajectories") == 6
    code, out, _ = polar(*arguments, "--json", home=copy.path)
    assert list(json.loads(out)["unavailable"]) == ["gone"]
    import dagster as dg

    with copy.instance() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("policies"))
    assert event is not None
    assert event.asset_materialization is not None
    assert list(event.asset_materialization.metadata["unavailable"].value) == ["gone"]


def test_ctrl_c_says_that_the_same_command_goes_on(polar, monkeypatch: pytest.MonkeyPatch):
    from assets import console

    def interrupted(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(console, "run_command", interrupted)
    code, _, err = polar("run", "-c", str(TINY / "run.yaml"))
    assert code == 130
    assert "goes on from here" in err


def test_ctrl_c_in_fine_tuning_says_so_too(polar, monkeypatch: pytest.MonkeyPatch):
    from assets import own

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(own, "finetune_own", interrupted)
    code, _, err = polar("finetune", "model", "--data", "mine.jsonl", "--out", "new")
    assert code == 130
    assert "goes on from here" in err


def test_the_command_is_installed():
    polar = Path(sys.executable).with_name("polar")
    done = subprocess.run(
        [polar, "--help"], capture_output=True, text=True, check=True, env={**os.environ, **ENV}
    )
    assert "run" in done.stdout


def test_two_pools_that_claim_one_source(polar, made: Home, tmp_path: Path):
    home = made.copy(tmp_path)
    arguments = ("run", "-c", str(home.config), "--until", "policies")
    assert polar(*arguments, home=home.path)[0] == 0
    other = tmp_path / "other"
    other.mkdir()
    for file in ("run.yaml", "pool.yaml"):
        shutil.copy(home.config.parent / file, other / file)
    theirs = Home(home.path, other / "run.yaml")
    assert polar("run", "-c", str(theirs.config), "--until", "policies")[0] == 0  # the same pool
    theirs.edit("run.yaml", name="theirs")
    theirs.edit(
        "pool.yaml", policies=theirs.workspace().pool.model_dump(mode="json")["policies"][:2]
    )
    before = home.one("from lake.current_snapshot()")
    refused(
        polar("run", "-c", str(theirs.config), "--until", "policies"),
        "two pools that both claim the source 'tiny'",
        "another POLAR_HOME",
    )
    theirs.edit("pool.yaml", source="elsewhere")
    message = "both name a policy 'school'; rename one of them"
    refused(polar("run", "-c", str(theirs.config), "--until", "policies"), message, "'elsewhere'")
    assert home.one("from lake.current_snapshot()") == before
    (home.config.parent / "pool.yaml").rename(home.config.parent / "moved.yaml")
    assert theirs.run("policies").ok  # whose file is gone claims nothing


@pytest.mark.slow
def test_a_policy_that_fails_is_tried_once_more_and_the_others_are_made(made: Home, tmp_path: Path):
    home = made.copy(tmp_path)
    pool = home.workspace().pool.model_dump(mode="json")["policies"]
    shutil.copytree(home.path / "policies" / "ash", home.path / "policies" / "broken")
    file = home.path / "policies" / "broken" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    more = {"kind": "chat", "template": "{prompt} ", "split": "train"}
    new = [
        {"name": "broken", "weights": "broken", **more},
        {"name": "sound", "weights": "ash", **more},
    ]
    home.edit("pool.yaml", policies=[*pool, *new])
    watch = Watch()
    outcome = home.run("trajectories", watch)
    assert [item.title for item in outcome.made] == ["policies", "trajectories: sound"]
    ((item, error),) = outcome.failed
    assert (item.title, outcome.stopped) == ("trajectories: broken", None)
    assert item.reason.startswith("once more: ")
    assert "does not load" in error
    assert [title for title, _ in watch.finished].count("trajectories: broken") == 2
    assert home.one("select count(distinct policy_id) from trajectories") == 7
