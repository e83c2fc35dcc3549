"""From a lake to groups and to the trainer's file: preferences, texts, and what may not leak."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import ids, schemas
from pipelines.balance import leakage
from pipelines.dedup import DedupSettings, dedup
from pipelines.engines import recorded
from pipelines.groups import GroupSettings, export_groups, make_groups, preference_groups
from pipelines.labels import input_sql
from pipelines.lake import Append, Lake
from pipelines.pairs import PairSettings, make_pairs
from pipelines.pairs_balance import label_shares
from pipelines.prompts import SplitSettings

SAMPLE = Path(__file__).parents[2].parent / "shared/data/sample"
SIDES = {"ann": "train", "bob": "train", "held": "test", "unknown:made": "test"}
PROMPTS = {"p0": "train", "p1": "test"}
TURNS = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def key(*parts):
    return ids.content_id(*parts)


def trajectory(prompt, policy, sample):
    return key("trajectory", prompt, policy, sample)


def rows(schema, found):
    """A table of rows whose missing columns are null, or empty where they must not be."""
    blank = {pa.string(): "", pa.int32(): 0, schemas.TEXTS: [], schemas.TIME: NOW}
    return pa.Table.from_pylist(
        [
            {f.name: row.get(f.name, None if f.nullable else blank.get(f.type)) for f in schema}
            for row in found
        ],
        schema=schema,
    )


def publish_world(lake, judged):
    """Two prompts, four authors with three answers each, and these judgements."""
    policies = [
        {
            "policy_id": key("policy", name),
            "name": name,
            "policy_group": f"group of {name}",
            "family": name,
            "source": "made",
            "split": side,
        }
        for name, side in SIDES.items()
    ]
    prompts = [
        {
            "prompt_id": key("prompt", name),
            "source_key": name,
            "text": f"text of {name}",
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "hi"},
            ]
            if name == "p1"
            else None,
            "source": "made",
            "prompt_group": f"group of {name}",
            "split": side,
            "category": "chat",
        }
        for name, side in PROMPTS.items()
    ]
    answers = [
        {
            "trajectory_id": trajectory(prompt, policy, n),
            "prompt_id": key("prompt", prompt),
            "policy_id": key("policy", policy),
            "sampling_id": key("sampling"),
            "text": f"{prompt} {policy} {n}",
            "content_hash": key("text", f"{prompt} {policy} {n}"),
        }
        for prompt in PROMPTS
        for policy in SIDES
        for n in range(3)
    ]
    preferences = [
        {
            "preference_id": key("preference", number),
            "prompt_id": key("prompt", prompt),
            "reference": reference and trajectory(prompt, *reference),
            "chosen": trajectory(prompt, *chosen),
            "rejected": trajectory(prompt, *rejected),
            "split": "train" if PROMPTS[prompt] == "train" else "eval",
        }
        for number, (prompt, reference, chosen, rejected) in enumerate(judged)
    ]
    found = {
        "policies": policies,
        "prompts": prompts,
        "trajectories": answers,
        "preferences": preferences,
    }
    lake.publish(
        "test",
        "a small world",
        [Append(name, rows(schemas.TABLES[name].schema, found[name])) for name in found],
    )


@pytest.fixture
def lake(tmp_path):
    with Lake.open(tmp_path / "home", threads=1, memory_limit="500MB") as opened:
        yield opened


ANN, BOB, HELD, NOBODY = (("ann", 0), ("bob", 0), ("held", 0), ("unknown:made", 0))


def test_a_preference_goes_to_the_cell_of_its_sides_or_says_why_not(lake):
    went = [
        (("p0", NOBODY, ANN, BOB), "", "train"),
        (("p0", NOBODY, ("unknown:made", 1), ("unknown:made", 2)), "", "train"),
        (("p0", NOBODY, ("held", 1), HELD), "", "new_policy"),
        (("p1", NOBODY, ANN, BOB), "", "new_prompt"),
        (("p1", ("held", 1), NOBODY, HELD), "", "both_new"),
        (("p0", ANN, BOB, HELD), "mixed_sides", ""),
        (("p0", None, ANN, BOB), "no_reference", "train"),
        (("p0", BOB, ANN, BOB), "same_text", "train"),
    ]
    publish_world(lake, [judged for judged, _, _ in went])
    groups, counts = preference_groups(lake, ["made"], snapshot=lake.snapshot())
    assert groups.schema.equals(schemas.GROUPS.schema)
    assert counts.schema.equals(schemas.COUNTS.schema)
    found = {(r["reason"], r["split"]): r["rows"] for r in counts.to_pylist() if r["what"] != "in"}
    assert found == Counter((reason, split) for _, reason, split in went)
    expected = {
        (trajectory(prompt, *reference), trajectory(prompt, *chosen), trajectory(prompt, *rejected))
        for (prompt, reference, chosen, rejected), reason, _ in went
        if not reason
    }
    assert {
        (r["reference"].bytes, *(c["trajectory_id"].bytes for c in r["candidates"]))
        for r in groups.to_pylist()
    } == expected
    for row in groups.to_pylist():
        assert [(c["rank"], c["relation"]) for c in row["candidates"]] == [(0, ""), (1, "")]
        assert (row["wrapper"], row["category"]) == ("sft", "chat")
        assert (row["split"] == "train") == (row["cell"] == "seen")


def test_equal_judgements_are_one_group_and_the_majority_holds(lake):
    one, other = ("p0", NOBODY, ANN, BOB), ("p0", NOBODY, BOB, ANN)
    tie = [("p1", NOBODY, ANN, BOB), ("p1", NOBODY, BOB, ANN)]
    publish_world(lake, [one, other, one, *tie])
    groups, counts = preference_groups(lake, ["made"], snapshot=lake.snapshot())
    assert [r["candidates"][0]["trajectory_id"].bytes for r in groups.to_pylist()] == [
        trajectory("p0", *ANN)
    ]
    reasons = Counter({r["reason"]: r["rows"] for r in counts.to_pylist() if r["what"] != "in"})
    assert reasons == {"": 1, "repeat": 1, "outvoted": 1, "tied": 2}


def test_other_sources_are_left_alone(lake):
    publish_world(lake, [("p0", NOBODY, ANN, BOB)])
    groups, counts = preference_groups(lake, ["other"], snapshot=lake.snapshot())
    assert (groups.num_rows, counts.num_rows) == (0, 0)


def test_the_file_holds_texts_and_is_what_the_trainer_reads(lake, tmp_path):
    trainer = pytest.importorskip("trainer.data")
    publish_world(lake, [("p0", NOBODY, ANN, BOB), ("p1", NOBODY, ANN, BOB)])
    groups, _ = preference_groups(lake, ["made"], snapshot=lake.snapshot())
    lake.publish("test", "groups", [Append("groups", groups)])
    path = tmp_path / "groups" / "sft.parquet"
    assert export_groups(lake, path, wrapper="sft", split="train", sources=["made"]) == 1
    (row,) = trainer.read_groups([path]).to_pylist()
    assert row["prompt"] == [{"role": "user", "content": "text of p0"}]
    assert row["reference"] == "p0 unknown:made 0"
    assert [c["text"] for c in row["candidates"]] == ["p0 ann 0", "p0 bob 0"]
    assert row["candidates"][0]["trajectory_id"] == ids.text(trajectory("p0", *ANN))
    assert row["candidates"][1]["policy_group"] == "group of bob"
    assert (row["prompt_group"], row["policy_group"]) == ("group of p0", "group of unknown:made")
    assert export_groups(lake, path, wrapper="sft", split="eval", cells=["new_prompt"]) == 1
    assert trainer.read_groups([path])["prompt"].to_pylist() == [TURNS]
    assert export_groups(lake, path, wrapper="sft", split="eval", cells=["both_new"]) == 0
    assert export_groups(lake, path, wrapper="sft", split="train", limit=0) == 0
    assert export_groups(lake, path, wrapper="sft", split="train", sources=["other"]) == 0
    assert trainer.read_groups([path]).num_rows == 0


def test_a_held_back_reference_in_a_train_group_is_found(lake, tmp_path):
    publish_world(lake, [])
    lake.copy(input_sql(["made"]), tmp_path / "answers.parquet")
    config = GroupSettings(seen_eval_share=0.4, seed=1)
    groups, _ = make_groups(tmp_path / "answers.parquet", config, tmp_path / "work")
    lake.publish("test", "groups", [Append("groups", groups)])
    assert leakage(lake).num_rows == 0
    cells = list(zip(groups["split"].to_pylist(), groups["cell"].to_pylist(), strict=True))
    held = groups.slice(cells.index(("eval", "seen")), 1)
    spoilt = held.set_column(0, groups.schema.field(0), ids.array([key("another group")]))
    place = groups.schema.get_field_index("split")
    spoilt = spoilt.set_column(place, groups.schema.field(place), pa.array(["train"]))
    lake.publish("test", "a mistake", [Append("groups", spoilt)])
    rules = leakage(lake)["rule"].to_pylist()
    assert "a held-back reference in a train group" in rules


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the shared sample data are not here")
def test_recorded_sample_from_files_to_groups(lake, tmp_path):
    found = recorded.ingest(SAMPLE, SplitSettings())
    tables = ("policies", "prompts", "trajectories", "preferences")
    lake.publish("test", "ingest", [Append(name, getattr(found, name)) for name in tables])
    sources = lake.query("select distinct source from prompts order by 1")["source"].to_pylist()
    lake.copy(
        "select t.trajectory_id, t.prompt_id, p.source, t.text from trajectories t "
        "join prompts p using (prompt_id) order by t.prompt_id, t.trajectory_id",
        tmp_path / "texts.parquet",
    )
    repeats = dedup([tmp_path / "texts.parquet"], DedupSettings(), tmp_path / "dedup")
    lake.publish("test", "dedup", [Append("duplicates", repeats.duplicates)])
    answers = tmp_path / "answers.parquet"
    lake.copy(input_sql(sources, repeats.signatures), answers)
    pairs = make_pairs(answers, PairSettings(require_same_sampling=False), tmp_path / "pairs")
    groups, counts = make_groups(
        answers, GroupSettings(require_same_sampling=False), tmp_path / "groups"
    )
    preferred, more = preference_groups(lake, sources, snapshot=lake.snapshot())
    lake.publish(
        "test",
        "pairs and groups",
        [
            Append("pairs", pairs.files),
            Append("groups", pa.concat_tables([groups, preferred])),
            Append("counts", pa.concat_tables([pairs.counts, counts, more])),
        ],
    )
    assert pairs.rows == lake.row_counts()["pairs"] > 1000
    assert {r["reason"] for r in pairs.counts.to_pylist()} >= {"exact", "unknown_policy"}
    for row in label_shares(pairs.counts).to_pylist():
        if row["source"] == "all" and row["possible"]:
            assert 0.05 <= row["share"] <= 0.6
    assert leakage(lake).num_rows == 0
    assert lake.duplicate_keys("groups").num_rows == lake.duplicate_keys("pairs").num_rows == 0
    written = sum(
        export_groups(lake, tmp_path / "file.parquet", wrapper=wrapper, split=split)
        for wrapper in ("pretrain", "sft")
        for split in ("train", "eval")
    )
    assert written == groups.num_rows + preferred.num_rows
    assert pq.read_table(tmp_path / "file.parquet")["split"].unique().to_pylist() == ["eval"]
