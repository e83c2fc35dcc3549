"""Checkpoints as policies: only whole ones, in order of steps, each the parent of the next."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import hub
from pipelines.errors import ConfigError, PolicyUnavailableError
from pipelines.policies import Pool, policies_table
from pipelines.prompts import SplitSettings
from pipelines.settings import parse
from pipelines.watch import Watch, step_of
from pipelines.weights import incomplete, parameters_of


def tensors(*names: str, values: int = 6, seed: int = 0) -> bytes:
    """A safetensors file with a 2 x 3 tensor for each name."""
    size = 4 * values
    header = {
        name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [at * size, (at + 1) * size]}
        for at, name in enumerate(names)
    }
    said = json.dumps(header).encode()
    return len(said).to_bytes(8, "little") + said + bytes([seed]) * (size * len(names))


def checkpoint(folder: Path, seed: int = 0, age: float = 1000.0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(tensors("a", "b", seed=seed))
    for path in folder.iterdir():
        os.utime(path, (time.time() - age,) * 2)
    return folder


def pool(*policies: dict[str, Any], **watch: Any) -> Pool:
    said = {"name": "mine", "folder": "runs/mine", "pattern": "step-*", **watch}
    return parse({"source": "test", "policies": policies, "watch": [said]}, Pool, "pool.yaml")


def test_whole_checkpoints_become_policies_in_order(tmp_path: Path):
    runs = tmp_path / "policies" / "runs" / "mine"
    for step in (1000, 200, 30):
        checkpoint(runs / f"step-{step}", step % 256)
    checkpoint(runs / "final")  # not of the pattern
    (runs / "step-5").mkdir()  # nothing in it yet
    base = {"name": "base", "kind": "base", "weights": str(checkpoint(tmp_path / "base", 9))}
    found = pool(base, parent="base", policy_group="mine", split="train").with_checkpoints(tmp_path)
    assert [p.name for p in found.policies] == ["base", "mine-30", "mine-200", "mine-1000"]
    assert [p.parent for p in found.policies] == [None, "base", "mine-30", "mine-200"]
    table, unavailable = policies_table(found, tmp_path, SplitSettings())
    assert not unavailable
    rows = {row["name"]: row for row in table.to_pylist()}
    assert [rows[f"mine-{step}"]["lineage_step"] for step in (30, 200, 1000)] == [30, 200, 1000]
    assert rows["mine-200"]["parent"] == rows["mine-30"]["policy_id"]
    assert {rows[name]["policy_group"] for name in rows if name != "base"} == {"mine"}
    before = table["policy_id"].to_pylist()
    checkpoint(runs / "step-2000", 77)
    again, _ = policies_table(
        pool(base, parent="base", policy_group="mine", split="train").with_checkpoints(tmp_path),
        tmp_path,
        SplitSettings(),
    )
    assert again["policy_id"].to_pylist()[:4] == before
    assert again.num_rows == 5


def test_a_run_that_has_no_checkpoint_yet_is_fine(tmp_path: Path):
    waiting = pool()
    assert waiting.with_checkpoints(tmp_path) is waiting
    assert policies_table(waiting, tmp_path, SplitSettings())[0].num_rows == 0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text('{"model_'), "or a broken one"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda f: (f / "model.safetensors").write_bytes(tensors("a", "b")[:-1]), "is cut off"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 40), "is cut off"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "is cut off"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b"PK\x03\x04 half"), "is cut off"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model.safetensors", "c": "model-2.safetensors"}}'
            ),
            "model-2.safetensors is missing",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json is broken"),
    ],
)
def test_an_unfinished_checkpoint_is_not_taken(tmp_path: Path, damage: Any, reason: str):
    folder = checkpoint(tmp_path / "policies" / "runs" / "mine" / "step-1")
    assert incomplete(folder) is None
    damage(folder)
    assert reason in str(incomplete(folder))
    watching = pool(settled=0)
    assert watching.with_checkpoints(tmp_path).policies == ()
    assert reason in watching.watch[0].unfinished(tmp_path)["step-1"]


def test_every_cut_of_a_weights_file_is_seen(tmp_path: Path):
    folder = checkpoint(tmp_path / "step-1")
    whole = tensors("a", "b")
    for length in range(len(whole)):
        (folder / "model.safetensors").write_bytes(whole[:length])
        assert incomplete(folder) == "model.safetensors is cut off"
    (folder / "model.safetensors").write_bytes(whole)
    assert incomplete(folder) is None


def test_it_waits_until_nothing_is_written_and_a_clock_that_went_back_does_not_stop_it(tmp_path):
    folder = checkpoint(tmp_path / "step-1", age=2)
    assert "written less than 30 s ago" in str(incomplete(folder, 30))
    assert incomplete(folder, 1) is None
    for path in folder.iterdir():
        os.utime(path, (time.time() + 86_400,) * 2)
    assert incomplete(folder, 30) is None


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        ({"hub": "org/model"}, "say either `folder` or `hub`"),
        ({"folder": None}, "say either `folder` or `hub`"),
        ({"folder": None, "hub": "org/model"}, "need engine vllm"),
        ({"parent": "nobody"}, "parent 'nobody', which is not in the pool"),
        ({"patern": "x"}, "did you mean 'pattern'"),
    ],
)
def test_a_watch_that_cannot_be_meant(watch: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        pool(**watch)


def test_a_checkpoint_of_another_policys_name_is_refused(tmp_path: Path):
    checkpoint(tmp_path / "policies" / "runs" / "mine" / "step-1")
    named = pool({"name": "mine-1", "kind": "base", "weights": "x"})
    with pytest.raises(ConfigError, match="both named 'mine-1'"):
        named.with_checkpoints(tmp_path)


def test_steps_and_parameters(tmp_path: Path):
    assert [step_of(name) for name in ("step-10", "global_step9537", "main")] == [10, 9537, None]
    assert parameters_of(checkpoint(tmp_path / "x")) == 12
    assert parameters_of(tmp_path / "nowhere") is None


def test_a_hubs_revisions_become_policies(tmp_path: Path):
    """What the hub says is made up here; no hub was asked."""
    watch = Watch(
        name="pythia", hub="org/pythia", pattern="step*", engine="vllm", kind="base", settled=0
    )
    assert watch.policies(tmp_path) == []

    def listed(repository: str) -> dict[str, str]:
        if repository == "org/gone":
            msg = "404"
            raise OSError(msg)
        return {"main": "c0", "step1000": "c1", "step512": "c2"}

    faults = hub.ask(["org/pythia", "org/gone"], tmp_path, listed)
    assert faults == {"org/gone": "the hub does not list its revisions: 404"}
    entries = watch.policies(tmp_path)
    assert [(e["name"], e["revision"], e["parent"]) for e in entries] == [
        ("pythia-512", "c2", None),
        ("pythia-1000", "c1", "pythia-512"),
    ]
    parse({"source": "s", "policies": entries}, Pool, "x")
    assert hub.ask(["org/gone"], tmp_path, listed)  # what is known stays known
    assert len(watch.policies(tmp_path)) == 2


def test_an_unknown_revision_is_said_with_the_nearest(monkeypatch: pytest.MonkeyPatch):
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    def missing(self: HfApi, repository: str, *, revision: str) -> None:
        request = httpx.Request("GET", "http://hub")
        raise RevisionNotFoundError("404", response=httpx.Response(404, request=request))

    def offline(self: HfApi, repository: str, *, revision: str) -> None:
        msg = "no network"
        raise OSError(msg)

    monkeypatch.setattr(HfApi, "model_info", missing)
    monkeypatch.setattr(hub, "revisions", lambda _: {"main": "a", "step1000": "b"})
    with pytest.raises(PolicyUnavailableError, match="no revision 'step100'; nearest: step1000"):
        hub.check_revision("org/no-such-model-here", "step100")
    monkeypatch.setattr(HfApi, "model_info", offline)
    with pytest.raises(PolicyUnavailableError, match=r"not in the cache and .*\(no network\)"):
        hub.check_revision("org/no-such-model-here", "main")


def test_a_pool_may_demand_licences(tmp_path: Path):
    checkpoint(tmp_path / "policies" / "a")
    entries = [
        {"name": "free", "kind": "base", "weights": "a", "licence": "MIT"},
        {"name": "none", "kind": "base", "weights": "a", "template": "{prompt} "},
        {"name": "who-knows", "kind": "base", "weights": "a", "template": "{prompt}\n",
         "licence": "unverified"},
    ]  # fmt: skip
    demanding = parse({"source": "s", "policies": entries, "require_licence": True}, Pool, "x")
    table, unavailable = policies_table(demanding, tmp_path, SplitSettings())
    assert table["name"].to_pylist() == ["free"]
    assert "policy 'none' has none; find out" in unavailable["none"]
    assert "has unverified" in unavailable["who-knows"]
    lenient = parse({"source": "s", "policies": entries}, Pool, "x")
    assert policies_table(lenient, tmp_path, SplitSettings())[0].num_rows == 3
