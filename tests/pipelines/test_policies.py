import json
from pathlib import Path

import pytest
import yaml

from pipelines import ids, schemas
from pipelines.errors import ConfigError, PolicyUnavailableError
from pipelines.policies import (
    Pool,
    PoolPolicy,
    load_pool,
    policies_table,
    policy_id,
    recorded_policy_id,
    render,
)
from pipelines.prompts import SplitSettings
from pipelines.weights import fingerprint

SPLIT = SplitSettings()


def policy(name: str, **more: object) -> dict[str, object]:
    return {"name": name, "kind": "base", "weights": name, **more}


def write_pool(path: Path, *policies: dict[str, object], **more: object) -> Path:
    path.write_text(yaml.safe_dump({"source": "test", "policies": list(policies), **more}))
    return path


def weights(folder: Path, tensors: bytes = b"tensors", **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_pool_file_is_read(tmp_path: Path) -> None:
    pool = load_pool(
        write_pool(
            tmp_path / "pool.yaml",
            policy("a-100", policy_group="a", kind="checkpoint", lineage_step=100),
            policy("a-200", policy_group="a", kind="checkpoint", parent="a-100", lineage_step=200),
            policy("chat", kind="chat", template="Q: {prompt}\nA:", family="f", split="test"),
            embedded={"anything": [1, 2]},
        )
    )
    assert [p.group for p in pool.policies] == ["a", "a", "chat"]
    assert render(pool.policies[2].template, "{x}") == "Q: {x}\nA:"
    assert render("{system}|{prompt}", "{system}", "{prompt}") == "{prompt}|{system}"
    assert render("{system}|{prompt}", "a") == "|a"
    assert pool.embedded == {"anything": [1, 2]}


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ([policy("a", polcy_group="g")], r"unknown key 'policies.0.polcy_group'.*'policy_group'"),
        ([policy("a"), policy("b"), policy("a")], "policies 1 and 3 are both named 'a'"),
        ([policy("a", parent="z")], "'a' has parent 'z', which is not in the pool"),
        ([policy("a", template="Q: A:")], r"policies.0.template: must hold the slot \{prompt\}"),
        ([policy("a", template="{prompt}{prompt}")], "exactly once"),
        ([policy("a", kind="bass")], "policies.0.kind"),
        ([policy("a", revision="main")], "local weights are known by content"),
        ([policy("a", engine="openai")], "needs a revision"),
        ([policy("a", engine="openai", revision="1")], "nothing says where it answers"),
        ([policy("a", vllm={"dtype": "float32"})], "section 'vllm' and engine local"),
        ([policy("a", interface="chat")], "engine local has no interface chat"),
        ([], "policies"),
        (
            [
                policy("a", policy_group="g", split="test"),
                policy("b", policy_group="g", split="train"),
            ],
            "policy group 'g' is on two sides: 'a' says test, 'b' says train",
        ),
    ],
)
def test_a_wrong_pool_file_is_refused(
    tmp_path: Path, policies: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_pool(write_pool(tmp_path / "pool.yaml", *policies))
    assert "pool.yaml" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_fingerprint_is_of_content_alone(tmp_path: Path) -> None:
    first = fingerprint(weights(tmp_path / "x", hidden_size=8))
    moved = weights(tmp_path / "elsewhere" / "y", hidden_size=8, transformers_version="9.9")
    (moved / "README.md").write_text("not part of the policy")
    assert fingerprint(moved) == first
    assert fingerprint(weights(tmp_path / "z", hidden_size=16)) != first
    assert fingerprint(weights(tmp_path / "w", b"other", hidden_size=8)) != first
    (moved / "tokenizer.json").write_text('{"added": 1}')
    assert fingerprint(moved) != first


def test_fingerprint_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(PolicyUnavailableError, match="no folder"):
        fingerprint(tmp_path / "nowhere")
    folder = weights(tmp_path / "w")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PolicyUnavailableError, match="holds no weights"):
        fingerprint(folder)
    (folder / "config.json").write_text("[1]")
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(PolicyUnavailableError, match=r"config\.json is not a JSON object"):
        fingerprint(folder)


def test_a_policy_without_weights_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    pool = Pool(
        source="test",
        policies=tuple(
            PoolPolicy.model_validate(p)
            for p in (
                policy("a", licence="MIT"),
                policy("gone"),
                policy("child", parent="a", lineage_step=2, policy_group="a", split="test"),
                policy("orphan", parent="gone", weights=str(tmp_path / "absolute")),
                policy("hub", engine="vllm", kind="chat", weights="org/model", revision="abc"),
            )
        ),
    )
    weights(tmp_path / "policies" / "a")
    weights(tmp_path / "policies" / "child", b"child")
    weights(tmp_path / "absolute", b"absolute")
    table, unavailable = policies_table(pool, tmp_path, SPLIT)
    assert list(unavailable) == ["gone"]
    assert "no folder" in unavailable["gone"]
    assert table.schema == schemas.POLICIES.schema
    rows = {row["name"]: row for row in table.to_pylist()}
    assert list(rows) == ["a", "child", "orphan", "hub"]
    assert rows["child"]["parent"] == rows["a"]["policy_id"]
    assert rows["orphan"]["parent"] is None
    assert rows["a"]["split"] == rows["child"]["split"] == "test"
    assert rows["hub"]["revision"] == "org/model@abc"
    assert rows["hub"]["policy_id"].bytes == policy_id("org/model@abc", "{prompt}", chat=True)


def test_identity_is_weights_and_template(tmp_path: Path) -> None:
    weights(tmp_path / "policies" / "a")
    weights(tmp_path / "policies" / "copy")
    twice = Pool.model_validate({"source": "t", "policies": [policy("a"), policy("copy")]})
    with pytest.raises(ConfigError, match="'a' and 'copy' have the same weights and template"):
        policies_table(twice, tmp_path, SPLIT)
    other = Pool.model_validate(
        {"source": "t", "policies": [policy("a"), policy("copy", template="{prompt}:")]}
    )
    table, _ = policies_table(other, tmp_path, SPLIT)
    assert len(set(ids.storage(table["policy_id"]).to_pylist())) == 2


def test_ids_are_golden() -> None:
    assert ids.text(policy_id("r", "{prompt}")) == "c7777483-e8c3-276d-fca0-2c47e8f03fec"
    assert (
        ids.text(recorded_policy_id("oasst_sampling", "gpt-4"))
        == "e2a4376d-a64e-7136-7907-04dae10351e6"
    )
