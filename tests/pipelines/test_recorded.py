import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import ids, schemas
from pipelines.engines.recorded import Ingested, fingerprint, ingest, row_counts
from pipelines.engines.recorded.columns import COLUMNS, NAMES
from pipelines.errors import BadInputError
from pipelines.policies import recorded_policy_id
from pipelines.prompts import SplitSettings, prompt_id

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared/data/sample"
SPLIT = SplitSettings()
ZERO_WIDTH = "\u200b"

needs_sample = pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no sample data in {SAMPLE}")


def answer(policy: str, response: Any, prompt: str = "What is 2+2?", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "policy": policy, "response": response, **more}


def judgement(chosen: str, rejected: str, preference: str = "a", **more: Any) -> dict[str, Any]:
    return {
        "prompt": "What is 2+2?",
        "response_a": chosen,
        "response_b": rejected,
        "preference": preference,
        **more,
    }


def jsonl(path: Path, *rows: dict[str, Any] | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def parquet(path: Path, rows: list[dict[str, Any]], **columns: pa.Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, values)
    pq.write_table(table, path)
    return path


def check(found: Ingested) -> Ingested:
    """What holds of every ingest: schemas, keys, references, and the account of rows."""
    for name in ("policies", "prompts", "trajectories", "preferences", "counts", "quarantine"):
        table, schema = getattr(found, name), schemas.TABLES[name]
        assert table.schema == schema.schema
        table.validate(full=True)
        for field in schema.schema:
            assert field.nullable or not table[field.name].null_count, (name, field.name)
        rows = table.select(list(schema.key)).to_pylist()
        assert len({tuple(row.values()) for row in rows}) == len(rows), f"{name}: key not unique"
    answers = ids.storage(found.trajectories["trajectory_id"]).to_pylist()
    for name, table in (("policy_id", found.policies), ("prompt_id", found.prompts)):
        known = set(ids.storage(table[name]).to_pylist())
        assert known >= set(ids.storage(found.trajectories[name]).to_pylist())
    for side in ("reference", "chosen", "rejected"):
        assert {*answers, None} >= set(ids.storage(found.preferences[side]).to_pylist())
    balance: dict[tuple[str, str], int] = {}
    for row in found.counts.to_pylist():
        key = row["source"], row["label"]
        balance[key] = balance.get(key, 0) + row["rows"] * (1 if row["what"] == "in" else -1)
    assert not any(balance.values())
    assert total(found, "quarantined") == len(found.quarantine)
    assert total(found, "out", "trajectories") + total(found, "out", "answers") == len(
        found.trajectories
    )
    assert total(found, "out", "prompts") == len(found.prompts)
    return found


def total(found: Ingested, what: str, label: str | None = None) -> int:
    return sum(
        row["rows"]
        for row in found.counts.to_pylist()
        if row["what"] == what and label in (None, row["label"])
    )


def read(data: Path) -> Ingested:
    return check(ingest(data, SPLIT))


def reasons(found: Ingested, what: str) -> dict[str, int]:
    rows = found.counts.to_pylist()
    return {row["reason"]: row["rows"] for row in rows if row["what"] == what}


# --- what is taken in


def test_three_columns_are_enough(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "mine.jsonl", answer("a", "4"), answer("b", "5"), answer("a", "four"))
    found = read(data)
    assert found.trajectories["text"].to_pylist() == ["4", "5", "four"]
    assert found.trajectories["sample_index"].to_pylist() == [0, 0, 1]
    assert found.trajectories["engine"].to_pylist() == ["recorded"] * 3
    policies = {row["name"]: row for row in found.policies.to_pylist()}
    assert list(policies) == ["a", "b"]
    assert {row["source"] for row in policies.values()} == {"mine"}
    assert policies["a"]["policy_group"] == policies["a"]["family"] == "a"
    assert policies["a"]["kind"] == "recorded"
    assert policies["a"]["policy_id"].bytes == recorded_policy_id("mine", "a")
    (prompt,) = found.prompts.to_pylist()
    assert prompt["text"] == "What is 2+2?"
    assert prompt["kind"] == "instruction"
    assert prompt["prompt_id"].bytes == prompt_id("mine", prompt["source_key"])


def test_every_column_lands_where_it_belongs(tmp_path: Path) -> None:
    data = tmp_path / "corpus"
    jsonl(
        data / "trajectories.jsonl",
        answer(
            "m-2", "4", prompt_id="q1", source="s", policy_group="m", family="f", lineage_step=200,
            sample_index=3, sampling="greedy", finished=False, is_correct=True, license="MIT",
        ),
        {"prompt_id": "q2", "source": "s", "policy": "m-2", "response": "Sure.", "finished": True},
    )  # fmt: skip
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    jsonl(
        data / "prompts.jsonl",
        {"prompt_id": "q2", "source": "s", "turns": turns, "category": "chat", "kind": "prefix"},
        {"prompt_id": "q1", "source": "s", "prompt_group": "g1", "reference": "4", "license": "X"},
    )
    found = read(data)
    first, second = found.trajectories.to_pylist()
    assert first["sampling"] == "greedy"
    assert (first["sample_index"], first["finish_reason"]) == (3, "length")
    assert first["flags"] == ["truncated"]
    assert first["correct"] is True
    assert (second["finish_reason"], second["flags"], second["correct"]) == ("stop", [], None)
    assert ids.text(first["trajectory_id"]) == ids.text(
        ids.content_id(
            "trajectory",
            recorded_policy_id("s", "m-2"),
            prompt_id("s", "q1"),
            ids.content_id("sampling", "recorded", "greedy"),
            3,
        )
    )
    (policy,) = found.policies.to_pylist()
    assert (policy["policy_group"], policy["family"], policy["lineage_step"]) == ("m", "f", 200)
    assert policy["licence"] == "MIT"
    prompts = {row["source_key"]: row for row in found.prompts.to_pylist()}
    assert prompts["q2"]["text"] == "Hello\nHi"
    assert prompts["q2"]["messages"] == turns
    assert (prompts["q2"]["kind"], prompts["q2"]["category"]) == ("prefix", "chat")
    assert prompts["q1"]["text"] == "What is 2+2?"
    assert (prompts["q1"]["prompt_group"], prompts["q1"]["reference"]) == ("g1", "4")
    assert prompts["q1"]["licence"] == "X"


def test_a_group_is_on_one_side_in_every_source(tmp_path: Path) -> None:
    rows = [answer(f"p{i}", "4", source=f"s{i % 3}", policy_group=f"g{i % 20}") for i in range(60)]
    found = read(jsonl(tmp_path / "t.jsonl", *rows))
    sides: dict[str, set[str]] = {}
    for row in found.policies.to_pylist():
        sides.setdefault(row["policy_group"], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert set.union(*sides.values()) == {"train", "test"}


@pytest.mark.parametrize("blank", ["", "  \n", ZERO_WIDTH])
def test_a_blank_answer_is_kept_and_flagged(tmp_path: Path, blank: str) -> None:
    found = read(jsonl(tmp_path / "t.jsonl", answer("a", blank), answer("a", "4")))
    assert found.trajectories["flags"].to_pylist() == [["empty"], []]


def test_ids_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = [
        answer(f"p{i % 3}", f"answer {i}", f"prompt {i % 5}", sample_index=i, policy_group="g")
        for i in range(40)
    ]
    shuffled = random.Random(0).sample(rows, len(rows))
    one, two = (
        read(jsonl(tmp_path / n / "t.jsonl", *r)) for n, r in (("x", rows), ("y", shuffled))
    )
    for name in ("trajectories", "prompts", "policies"):
        key = schemas.TABLES[name].key[0]
        tables = [
            {row[key]: {**row, "created_at": None} for row in getattr(found, name).to_pylist()}
            for found in (one, two)
        ]
        assert tables[0] == tables[1]


@needs_sample
def test_jsonl_and_parquet_say_the_same(tmp_path: Path) -> None:
    data = tmp_path / "sample"
    for path in SAMPLE.glob("*.parquet"):
        rows = pq.read_table(path).to_pylist()
        present = [{k: v for k, v in row.items() if v is not None} for row in rows]
        jsonl(data / f"{path.stem}.jsonl", *present)
    left, right = read(SAMPLE), read(data)
    assert len(left.trajectories) == 431
    assert len(left.preferences) == 118
    for name in ("policies", "prompts", "trajectories", "preferences", "counts"):
        tables = [getattr(found, name) for found in (left, right)]
        if "created_at" in tables[0].column_names:
            tables = [table.drop_columns("created_at") for table in tables]
        assert tables[0].equals(tables[1]), name


# --- preferences


def test_named_sides_are_trajectories_and_unnamed_ones_become_them(tmp_path: Path) -> None:
    data = tmp_path / "mine"
    jsonl(data / "trajectories.jsonl", answer("a", "4"), answer("a", "four"), answer("b", "5"))
    named: dict[str, Any] = {"policy_a": "a", "sample_index_a": 1, "policy_b": "b"}
    jsonl(
        data / "preferences.jsonl",
        judgement("four", "5", **named, annotator="me", strength=2, category="math"),
        judgement("x", "y", "b", annotator_type="llm"),
        judgement("x", "z", "tie"),
    )
    found = read(data)
    answers = {row["trajectory_id"]: row for row in found.trajectories.to_pylist()}
    names = {row["policy_id"]: row["name"] for row in found.policies.to_pylist()}
    first, second = found.preferences.to_pylist()
    assert [answers[first[side]]["text"] for side in ("chosen", "rejected")] == ["four", "5"]
    assert [answers[second[side]]["text"] for side in ("chosen", "rejected")] == ["y", "x"]
    assert first["reference"] is None
    assert (first["annotator"], first["annotator_type"]) == ("me", "human")
    assert (first["strength"], first["category"]) == (2, "math")
    assert (second["annotator"], second["annotator_type"]) == ("unknown", "llm")
    unnamed = [row for row in answers.values() if names[row["policy_id"]] == "unknown:mine"]
    assert sorted(row["text"] for row in unnamed) == ["x", "y", "z"]
    assert sorted(row["sample_index"] for row in unnamed) == [0, 1, 2]
    assert reasons(found, "excluded") == {"tie": 1}


def test_a_named_answer_that_is_nowhere_becomes_a_trajectory_of_that_policy(tmp_path: Path) -> None:
    data = tmp_path / "mine"
    jsonl(data / "preferences.jsonl", judgement("4", "5", policy_a="a", policy_b="a"))
    found = read(data)
    (policy,) = found.policies.to_pylist()
    assert policy["name"] == "a"
    assert found.trajectories["sample_index"].to_pylist() == [0, 1]
    jsonl(data / "trajectories.jsonl", answer("a", "4"), answer("a", "5"))
    again = read(data)
    assert again.trajectories["trajectory_id"].equals(found.trajectories["trajectory_id"])


def test_the_reference_is_the_human_trajectory_or_an_unnamed_one(tmp_path: Path) -> None:
    data = tmp_path / "mine"
    other = {"prompt": "And 3+3?"}
    jsonl(
        data / "trajectories.jsonl",
        answer("human-reference", "It is four."),
        answer("human-reference", "Seven, I guess.", **other),
    )
    jsonl(
        data / "prompts.jsonl",
        {"prompt": "What is 2+2?", "reference": "It is four.\n", "category": "math"},
        {**other, "reference": "six"},
    )
    jsonl(data / "preferences.jsonl", judgement("4", "5"), judgement("6", "7", **other))
    found = read(data)
    owners = dict(
        zip(
            found.trajectories["trajectory_id"].to_pylist(),
            found.trajectories.select(["policy_id", "text"]).to_pylist(),
            strict=True,
        )
    )
    names = {row["policy_id"]: row["name"] for row in found.policies.to_pylist()}
    references = [owners[row["reference"]] for row in found.preferences.to_pylist()]
    assert [(names[row["policy_id"]], row["text"]) for row in references] == [
        ("human-reference", "It is four."),
        ("unknown:mine", "six"),
    ]
    assert found.preferences["category"].to_pylist() == ["math", None]


def test_what_gives_the_answer_away_is_excluded(tmp_path: Path) -> None:
    data = tmp_path / "mine"
    jsonl(data / "prompts.jsonl", {"prompt": "What is 2+2?", "reference": "It is 4"})
    jsonl(
        data / "preferences.jsonl",
        judgement("it is  4", "5"),
        judgement("4", "IT IS 4"),
        judgement("same", "same"),
        judgement("4", "5"),
        judgement("4", "5"),
        judgement("5", "4", "b"),
    )
    found = read(data)
    assert len(found.preferences) == 1
    assert reasons(found, "excluded") == {
        "reference_is_chosen": 1,
        "reference_is_rejected": 1,
        "same_text": 1,
        "repeated": 2,
    }


def test_a_ranked_triple_is_a_preference_with_its_best_answer_as_reference(tmp_path: Path) -> None:
    data = tmp_path / "mine"
    jsonl(data / "trajectories.jsonl", answer("a", "best"), answer("b", "middle"))
    triple: dict[str, Any] = {
        "prompt": "What is 2+2?",
        "annotator": "me",
        "annotator_type": "human",
    }
    for rank, (policy, text) in enumerate([("a", "best"), ("b", "middle"), (None, "worst")], 1):
        triple |= {f"policy_{rank}": policy, f"response_{rank}": text}
    jsonl(data / "ranked_triples.jsonl", triple)
    found = read(data)
    texts = dict(
        zip(
            found.trajectories["trajectory_id"].to_pylist(),
            found.trajectories["text"].to_pylist(),
            strict=True,
        )
    )
    (row,) = found.preferences.to_pylist()
    sides = [texts[row[side]] for side in ("reference", "chosen", "rejected")]
    assert sides == ["best", "middle", "worst"]
    assert len(texts) == 3


# --- bad rows


@pytest.mark.parametrize(
    ("bad", "reason", "problem"),
    [
        (b'{"prompt": "p", "policy": "a", "resp', "not_json", "not valid JSON"),
        (b"[1, 2]", "not_json", "one object a line is expected"),
        (b"[" * 100_000, "not_json", "not valid JSON"),
        (b'{"prompt": "p", "policy": "a", "response": "\xff"}', "not_utf8", "UTF-8 at byte 45"),
        (b'{"prompt": "p", "policy": "a", "response": "\\ud800"}', "not_utf8", "surrogate"),
        ({"prompt": "p", "policy": "a"}, "missing", "response is missing"),
        ({"prompt": "p", "response": "4"}, "missing", "policy is missing"),
        ({"policy": "a", "response": "4"}, "missing", "neither prompt nor prompt_id"),
        (answer("a", None), "null", "response is null"),
        (answer("a", 4), "wrong_type", "response is 4, expected text"),
        (answer("a", "4", sample_index="one"), "wrong_type", "sample_index is 'one', expected an"),
        (answer("a", "4", sample_index=2**40), "wrong_type", "sample_index is 1099511627776"),
        (answer("a", "4", finished="yes"), "wrong_type", "finished is 'yes', expected true or"),
        (answer("a", "4", sample_index=-1), "wrong_value", "it counts from 0"),
        (
            answer("good", "4", sample_index=0, sampling=""),
            "duplicate",
            "sample 0 of policy 'good'",
        ),
        (answer("good", "4", sample_index=0), "duplicate", "sample 0 of policy 'good'"),
        (answer("good", "4", "Other?", prompt_id="q"), "conflict", "'q' already has another text"),
        (answer("good", "x", policy_group="h"), "conflict", "already has another policy_group"),
        ({"prompt_id": "z", "policy": "a", "response": "4"}, "unknown_prompt", "of prompt 'z'"),
    ],
)
def test_a_bad_row_is_quarantined_with_its_line_and_the_rest_ingested(
    tmp_path: Path, bad: dict[str, Any] | bytes, reason: str, problem: str
) -> None:
    good = [
        answer("good", "4", sample_index=0, policy_group="g"),
        answer("good", "4", "How?", prompt_id="q"),
    ]
    data = jsonl(tmp_path / "mine" / "trajectories.jsonl", *good, b"", bad, answer("b", "5")).parent
    found = read(data)
    assert found.trajectories["text"].to_pylist() == ["4", "4", "5"]
    (row,) = found.quarantine.to_pylist()
    assert (row["file"], row["row"]) == ("mine/trajectories.jsonl", 4)
    assert problem in row["problem"]
    assert row["excerpt"]
    assert len(row["excerpt"]) <= 200
    assert reasons(found, "quarantined") == {reason: 1}
    assert total(found, "in", "trajectories") == 4


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=8),
    st.lists(st.just("x"), max_size=1), st.sampled_from(["a", "b", "tie", "\ud800", "human"]),
)  # fmt: skip


@pytest.mark.parametrize("label", sorted(COLUMNS))
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_no_line_stops_the_others(
    tmp_path_factory: pytest.TempPathFactory, label: str, data: st.DataObject
) -> None:
    fields = {column.name: VALUES for column in COLUMNS[label]}
    row = st.fixed_dictionaries({}, optional=fields).map(lambda row: json.dumps(row).encode())
    noise = st.binary(max_size=20).map(lambda line: line.replace(b"\n", b""))
    lines = data.draw(st.lists(row | noise, max_size=12))
    folder = tmp_path_factory.mktemp("fuzz")
    jsonl(folder / "trajectories.jsonl", answer("sure", "4"))
    path = jsonl(folder / f"{label}.jsonl", *lines, answer("sure", "5"))
    found = read(folder)
    assert "sure" in found.policies["name"].to_pylist()
    given_rows = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
    rows = total(found, "in", label)
    assert rows == given_rows if label != "prompts" else rows >= given_rows


def test_bad_preferences_and_prompts_are_quarantined(tmp_path: Path) -> None:
    data = tmp_path / "mine"
    jsonl(data / "trajectories.jsonl", answer("a", "4"))
    jsonl(
        data / "preferences.jsonl",
        judgement("4", "5"),
        judgement("4", "5", "c"),
        judgement("4", "5", annotator_type="cat"),
        {"prompt": "What is 2+2?", "response_b": "5", "preference": "a"},
        judgement("5", "6", policy_a="a", sample_index_a=0),
    )
    jsonl(
        data / "prompts.jsonl",
        {"prompt": "What is 2+2?"},
        {"prompt": "What is 2+2?"},
        {"prompt": "x", "kind": "question"},
        {"prompt": "y", "turns": [{"role": "user"}]},
        {"prompt": "y", "turns": [{"role": "user", "content": None}]},
        {"prompt": "y", "turns": [{"role": "user", "content": {"text": "y"}}]},
        {"prompt": "y", "turns": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"prompt": "y", "turns": [{"role": 1, "content": "y"}]},
    )
    found = read(data)
    assert [(row["file"], row["row"]) for row in found.quarantine.to_pylist()] == [
        *(("mine/prompts.jsonl", row) for row in range(4, 9)),
        ("mine/prompts.jsonl", 2),
        ("mine/prompts.jsonl", 3),
        ("mine/preferences.jsonl", 3),
        ("mine/preferences.jsonl", 2),
        ("mine/preferences.jsonl", 4),
        ("mine/preferences.jsonl", 5),
    ]
    assert len(found.preferences) == 1


@pytest.mark.parametrize("strength", ["1" + 400 * "0", "1e39", "-1e39", "NaN", "Infinity"])
def test_a_strength_that_no_column_holds_is_a_bad_row(tmp_path: Path, strength: str) -> None:
    line = json.dumps(judgement("4", "5", strength=7)).replace("7", strength).encode()
    good = judgement("4", "6", strength=2**63)
    found = read(jsonl(tmp_path / "mine/preferences.jsonl", line, good).parent)
    assert found.preferences["strength"].to_pylist() == [2.0**63]
    assert [(row["row"], row["field"]) for row in found.quarantine.to_pylist()] == [(1, "strength")]


def test_strengths_of_parquet_are_rounded_and_those_without_value_set_aside(tmp_path: Path) -> None:
    rows = [judgement("4", other) for other in ("5", "6", "7")]
    for values, kept in (
        (pa.array([2**53 + 1, 3, None]), [2.0**53, 3.0, None]),
        (pa.array([0.5, float("nan"), 1e300]), [0.5]),
    ):
        found = read(parquet(tmp_path / "mine/preferences.parquet", rows, strength=values).parent)
        assert sorted(found.preferences["strength"].to_pylist(), key=str) == sorted(kept, key=str)
        assert len(found.quarantine) == 3 - len(kept)


TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    "kind", [pa.list_(schemas.MESSAGES.value_type), pa.large_list(schemas.MESSAGES.value_type),
             pa.list_(schemas.MESSAGES.value_type, 2)]
)  # fmt: skip
def test_turns_may_be_any_list(tmp_path: Path, kind: pa.DataType) -> None:
    jsonl(tmp_path / "mine/trajectories.jsonl", {"prompt_id": "q", "policy": "a", "response": "4"})
    path = tmp_path / "mine/prompts.parquet"
    found = read(parquet(path, [{"prompt_id": "q"}], turns=pa.array([TURNS], kind)).parent)
    assert found.prompts["messages"].to_pylist() == [TURNS]
    assert found.prompts["text"].to_pylist() == ["Be brief.\nWhy?"]


def test_the_text_parts_of_a_turn_are_its_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Why?"}, {"type": "text", "text": "And how?"}]
    jsonl(
        tmp_path / "mine/trajectories.jsonl",
        {"prompt_id": "q", "policy": "a", "response": "4"},
    )
    row = {"prompt_id": "q", "turns": [{"role": "user", "content": parts}]}
    found = read(jsonl(tmp_path / "mine/prompts.jsonl", row).parent)
    assert found.prompts["text"].to_pylist() == ["Why?\nAnd how?"]
    assert not len(found.quarantine)


def test_parquet_rows_are_quarantined_too(tmp_path: Path) -> None:
    data = parquet(
        tmp_path / "t.parquet",
        [answer("a", None), answer("a", "4"), answer(None, "5"), answer("b", "6")],  # type: ignore[arg-type]
    )
    found = read(data)
    assert found.trajectories["text"].to_pylist() == ["4", "6"]
    assert [(row["row"], row["field"]) for row in found.quarantine.to_pylist()] == [
        (3, "policy"),
        (1, "response"),
    ]


def test_invalid_utf8_in_parquet_is_quarantined(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff\xfe", b"4", b"5"])
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    rows = [answer("a", ""), answer("a", ""), answer("b", ""), answer("b", "")]
    prompt = pa.Array.from_buffers(pa.string(), 4, pa.array([b"p", b"p", b"\xc3(", b"q"]).buffers())
    found = read(parquet(tmp_path / "t.parquet", rows, response=text, prompt=prompt))
    assert found.trajectories["text"].to_pylist() == ["fine", "5"]
    assert sorted((row["row"], row["field"]) for row in found.quarantine.to_pylist()) == [
        (2, "response"),
        (3, "prompt"),
    ]


# --- files of no use


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"response": pa.array([1, 2])}, "'response' has type int64, expected text"),
        ({"response": pa.array([["x"], ["y"]])}, r"'response' has type list<.*>, expected text"),
        ({"sample_index": pa.array(["a", "b"])}, "'sample_index' has type string, expected an int"),
        ({"sample_index": pa.array([0.5, 1.0])}, "'sample_index' holds a value that is not int32"),
        ({"sample_index": pa.array([1, 2**40])}, "'sample_index' holds a value that is not int32"),
        ({"finished": pa.array([1, 0])}, "'finished' has type int64, expected true or false"),
    ],
)
def test_a_parquet_column_of_a_wrong_type_is_refused(
    tmp_path: Path, columns: dict[str, pa.Array], message: str
) -> None:
    data = parquet(tmp_path / "t.parquet", [answer("a", "4"), answer("b", "5")], **columns)
    with pytest.raises(BadInputError, match=rf"t\.parquet: column {message}"):
        ingest(data, SPLIT)


def test_castable_columns_are_cast(tmp_path: Path) -> None:
    rows = [answer("a", "4"), answer("a", "5")]
    found = read(
        parquet(
            tmp_path / "t.parquet",
            rows,
            response=pa.array(["4", "5"], pa.large_string()),
            prompt=pa.array(["p", "p"]).dictionary_encode(),
            policy=pa.array([b"a", b"a"]),
            prompt_id=pa.array([7, 7]),
            sample_index=pa.array([0.0, None]),
            is_correct=pa.nulls(2),
        )
    )
    assert found.trajectories["sample_index"].to_pylist() == [0, 1]
    assert found.prompts["source_key"].to_pylist() == ["7"]


def test_files_of_no_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such file or folder"):
        ingest(tmp_path / "nowhere", SPLIT)
    with pytest.raises(BadInputError, match=r"holds no trajectories\.parquet"):
        ingest(tmp_path, SPLIT)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BadInputError, match=r"neither \.parquet nor \.jsonl"):
        ingest(tmp_path / "notes.txt", SPLIT)
    for name in ("trajectories.parquet", "trajectories.jsonl"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadInputError, match="holds both"):
        ingest(tmp_path, SPLIT)
    with pytest.raises(BadInputError, match="not a readable Parquet file"):
        ingest(tmp_path / "trajectories.parquet", SPLIT)
    with pytest.raises(BadInputError, match="its files are empty"):
        ingest(tmp_path / "trajectories.jsonl", SPLIT)
    (tmp_path / "trajectories.jsonl").write_bytes(b"nonsense\n")
    with pytest.raises(BadInputError, match=r"no usable row\n.*row 1: not valid JSON"):
        ingest(tmp_path / "trajectories.jsonl", SPLIT)
    parquet(tmp_path / "a.parquet", [{"prompt": "p", "policy": "a", "respons": "4"}])
    with pytest.raises(BadInputError, match="no column 'response'; did you mean 'respons'"):
        ingest(tmp_path / "a.parquet", SPLIT)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInputError, match="not a readable Parquet file"):
        ingest(tmp_path / "b.parquet", SPLIT)


# --- the rest


def test_fingerprint_is_of_content_not_of_place(tmp_path: Path) -> None:
    for place in ("x", "y"):
        jsonl(tmp_path / place / "trajectories.jsonl", answer("a", "4", source="s"))
    first = fingerprint(tmp_path / "x")
    assert fingerprint(tmp_path / "y") == first
    jsonl(tmp_path / "y" / "preferences.jsonl", judgement("4", "5", source="s"))
    assert fingerprint(tmp_path / "y") != first
    jsonl(tmp_path / "x" / "trajectories.jsonl", answer("a", "5", source="s"))
    assert fingerprint(tmp_path / "x") != first


def test_a_place_that_names_the_source_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    for place in ("a/data", "b/data", "b/other"):
        parquet(tmp_path / place / "trajectories.parquet", [answer("a", "4")])
    one, same, other = (fingerprint(tmp_path / p) for p in ("a/data", "b/data", "b/other"))
    assert one == same != other


def test_rows_are_counted_before_they_are_read(tmp_path: Path) -> None:
    jsonl(tmp_path / "trajectories.jsonl", answer("a", "4"), b"", b"broken")
    parquet(tmp_path / "prompts.parquet", [{"prompt": "p"}] * 3)
    assert row_counts(tmp_path) == {"trajectories": 2, "prompts": 3}


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    ingest(jsonl(tmp_path / "t.jsonl", answer("a", "4")), SPLIT, lambda *args: seen.append(args))
    assert seen[-1] == (1, 1, "ingesting answers")


def test_the_page_for_users_lists_every_column() -> None:
    page = (ROOT / "docs/recorded.md").read_text(encoding="utf-8")
    for label, columns in COLUMNS.items():
        section = page.split(f"## {label}\n")[1].split("\n## ")[0]
        listed = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
        assert [(a.strip().strip("`"), b.strip()) for a, b in listed] == [
            (column.name, NAMES[column.type]) for column in columns
        ]
