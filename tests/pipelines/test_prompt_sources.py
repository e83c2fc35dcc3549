"""Prompts from files: what is drawn, in which group, what is kept out, and that nothing is lost."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import ids, schemas
from pipelines.decontamination import Known, near_groups, shared_runs, words
from pipelines.errors import BadInputError, ConfigError
from pipelines.prompt_files import BadRow, asked, find_files
from pipelines.prompt_sources import Drawn, Places, PromptSources, draw_prompts, planned
from pipelines.prompts import SplitSettings, side, system_turn
from pipelines.settings import parse

SPLIT = SplitSettings(prompt_test_share=0.5)
NOUNS = ["river", "stone", "lamp", "wagon", "miller", "bread", "harbour", "winter", "letter"]


def document(number: int, length: int = 60) -> str:
    rng = random.Random(number)
    return f"Document {number} begins. " + " ".join(rng.choices(NOUNS, k=length)) + "."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every word, space included, is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    made = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    return folder


def jsonl(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def draw(folder: Path, *files: dict[str, Any], groups: Any = None, **more: Any) -> Drawn:
    settings = parse({"files": files, **more}, PromptSources, "test")
    places = Places(base=folder, policies=folder / "policies")
    return draw_prompts(settings, "pool", SPLIT, places, groups)


def instructions(path: str, **more: Any) -> dict[str, Any]:
    return {"name": "set", "path": path, "kind": "instructions", **more}


def documents(path: str, **more: Any) -> dict[str, Any]:
    return {"name": "docs", "path": path, "kind": "documents", **more}


def accounts(drawn: Drawn) -> dict[tuple[str, str], int]:
    """Rows by what and reason, over all files; nothing was lost."""
    total: dict[tuple[str, str], int] = {}
    for row in drawn.counts.to_pylist():
        key = (row["what"], row["reason"])
        total[key] = total.get(key, 0) + row["rows"]
    assert total["in", ""] == sum(n for (what, _), n in total.items() if what != "in")
    assert total.get(("out", ""), 0) == drawn.prompts.num_rows
    return total


def test_documents_become_beginnings_from_parquet_jsonl_and_folders(tmp_path, tokenizer):
    texts = [document(n) for n in range(30)]
    pq.write_table(pa.table({"text": texts[:10]}), tmp_path / "a.parquet")
    jsonl(tmp_path / "b.jsonl", *({"text": text} for text in texts[10:20]))
    (tmp_path / "books").mkdir()
    for number, text in enumerate(texts[20:]):
        (tmp_path / "books" / f"{number}.txt").write_text(text, encoding="utf-8")
    files = [
        documents("a.parquet", name="parquet"),
        documents("b.jsonl", name="lines"),
        documents("books", name="books", licence="CC0-1.0"),
    ]
    drawn = draw(tmp_path, *files, tokenizer=str(tokenizer), prefix_tokens=[2, 40])
    assert drawn.prompts.schema == schemas.PROMPTS.schema
    assert accounts(drawn) == {("in", ""): 30, ("out", ""): 30}
    lengths = set()
    for row in drawn.prompts.to_pylist():
        (origin,) = [text for text in texts if text.startswith(row["text"])]
        assert origin != row["text"]  # something is left to continue
        assert 2 <= len(row["text"].split()) <= 40
        lengths.add(len(row["text"].split()))
        assert row["kind"] == "prefix"
        assert row["category"] in ("parquet", "lines", "books")
    assert len(lengths) > 10
    origins = {row["origin"] for row in drawn.prompts.to_pylist()}
    assert {"parquet/a.parquet:1", "lines/b.jsonl:10", "books/7.txt:1"} <= origins
    licences = dict(zip(drawn.prompts["category"].to_pylist(), drawn.prompts["licence"].to_pylist(),
                        strict=True))  # fmt: skip
    assert licences == {"parquet": None, "lines": None, "books": "CC0-1.0"}


def test_a_folder_is_not_its_readme(tmp_path):
    folder = tmp_path / "prompts"
    about = ["README.md", "LICENSE.txt", "more/Readme.md", ".cache/x.txt"]
    for name in (*about, "a.txt", "license.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    named = [str(path.relative_to(folder)) for path in find_files("prompts", tmp_path)]
    assert named == ["a.txt", "license.jsonl"]
    assert find_files("prompts/README.md", tmp_path) == [folder / "README.md"]  # asked by name


def test_what_is_drawn_follows_from_texts_and_seed_alone(tmp_path, tokenizer):
    rows = [{"text": document(n)} for n in range(200)]
    jsonl(tmp_path / "one.jsonl", *rows)
    shuffled = random.Random(0).sample(rows, 200)
    (tmp_path / "two").mkdir()
    jsonl(tmp_path / "two" / "x.jsonl", *shuffled[:70])
    jsonl(tmp_path / "two" / "y.jsonl", *shuffled[70:])
    options: dict[str, Any] = {"tokenizer": str(tokenizer), "prefix_tokens": [1, 30]}

    def keys(path: str, **more: Any) -> set[tuple[str, str]]:
        given = options | more
        limit = given.pop("limit", 50)
        table = draw(tmp_path, documents(path, limit=limit), **given).prompts
        return {(row["source_key"], row["text"]) for row in table.to_pylist()}

    once = keys("one.jsonl")
    assert len(once) > 40
    assert keys("two/*.jsonl") == once
    assert keys("one.jsonl", seed=1) != once
    jsonl(tmp_path / "one.jsonl", *rows, *({"text": document(n)} for n in range(1000, 1020)))
    assert len(once - keys("one.jsonl")) <= 12  # about 50 of 220 are drawn: few give way
    assert once <= keys("one.jsonl", limit=None)


def test_more_documents_never_unmake_a_prompt(tmp_path, tokenizer):
    rows = [{"text": document(n)} for n in range(200)]
    options: dict[str, Any] = {"tokenizer": str(tokenizer), "prefix_tokens": [4, 30]}
    jsonl(tmp_path / "d.jsonl", *rows[:60])
    first = draw(tmp_path, documents("d.jsonl", limit=30), **options).prompts
    groups = dict(
        zip(
            ids.storage(first["prompt_id"]).to_pylist(),
            first["prompt_group"].to_pylist(),
            strict=True,
        )
    )
    jsonl(tmp_path / "d.jsonl", *rows[::-1])

    def drawn(limit: int) -> dict[bytes, str]:
        table = draw(tmp_path, documents("d.jsonl", limit=limit), groups=groups, **options).prompts
        keys = ids.storage(table["prompt_id"]).to_pylist()
        return dict(zip(keys, table["text"].to_pylist(), strict=True))

    before = drawn(30)
    assert before.keys() == groups.keys()
    assert sorted(before.values()) == sorted(first["text"].to_pylist())
    assert drawn(50).keys() > groups.keys()
    assert drawn(10).keys() < groups.keys()


def test_a_limit_and_repeats_and_short_documents_are_counted(tmp_path, tokenizer):
    rows = [{"text": document(n)} for n in range(20)] + [{"text": document(0)}, {"text": "one"}]
    jsonl(tmp_path / "d.jsonl", *rows)
    options = {"tokenizer": str(tokenizer), "prefix_tokens": [4, 40]}
    found = accounts(draw(tmp_path, documents("d.jsonl"), **options))
    assert found["excluded", "repeated"] == 1
    assert found["excluded", "too_short"] == 1
    limited = accounts(draw(tmp_path, documents("d.jsonl", limit=5), **options))
    assert limited["excluded", "limit"] == 16


def test_characters_of_several_bytes_are_never_torn(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(alphabet))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))  # a token is a byte
    texts = [f"今天{n}下雨。明天也会下雨吗？\U0001f327" * 3 for n in range(40)]
    jsonl(tmp_path / "d.jsonl", *({"text": text} for text in texts))
    drawn = draw(tmp_path, documents("d.jsonl"), tokenizer=".", prefix_tokens=[1, 50])
    for row in drawn.prompts.to_pylist():
        assert any(text.startswith(row["text"]) for text in texts)
        assert "\ufffd" not in row["text"]


FORMATS = [
    ({"instruction": "Add.", "input": "2 and 2", "output": "4"}, "Add.\n\n2 and 2", None, "4"),
    ({"instruction": "Add 2 and 2.", "input": "", "output": "4"}, "Add 2 and 2.", None, "4"),
    (
        {"conversations": [{"from": "system", "value": "Be kind."},
                           {"from": "human", "value": "Hi"},
                           {"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Bye"}]},
        "Hi", "Be kind.", "Hello",
    ),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
     "Hi", None, "Yo"),
    ({"messages": json.dumps([{"role": "user", "content": "Hi"}])}, "Hi", None, None),
    ({"prompt": [{"role": "user", "content": "Hi"}]}, "Hi", None, None),
    ({"prompt": "Hi"}, "Hi", None, None),
    ({"messages": [{"role": "developer", "content": "Be kind."},
                   {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
     "Hi", "Be kind.\n\nBe brief.", None),
    ({"messages": [{"role": "system", "content": " "}, {"role": "user", "content": "Hi"}],
      "system": "Be kind."}, "Hi", "Be kind.", None),
    ({"instruction": "Add.", "input": "2", "system": "Be kind."},
     "Add.\n\n2", "Be kind.", None),
    ({"system_prompt": "Be kind.", "question": "Why?", "response": "So."},
     "Why?", "Be kind.", "So."),
    ({"prompt": "Hi", "system": {"cores": 2}}, "Hi", None, None),
    ({"question": "Why?", "answer": "So."}, "Why?", None, "So."),
]  # fmt: skip


@pytest.mark.parametrize(("row", "text", "system", "reference"), FORMATS)
def test_the_usual_formats(row, text, system, reference):
    found = asked(row)
    assert (found.text, found.system, found.reference) == (text, system, reference)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "missing"),
        ({"prompt": " \n"}, "empty"),
        ({"prompt": 3}, "wrong_type"),
        ({"instruction": None, "x": 1}, "missing"),
        ({"messages": "not json"}, "wrong_type"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "missing"),
        ({"messages": [{"role": "user", "content": None}]}, "missing"),
        ({"conversations": ["Hi"]}, "wrong_type"),
        (
            {
                "messages": [
                    {"role": "system", "content": [{"text": "Be kind."}]},
                    {"role": "user", "content": "Hi"},
                ]
            },
            "wrong_type",
        ),
    ],
)
def test_a_row_that_asks_nothing(row, reason):
    with pytest.raises(BadRow) as caught:
        asked(row)
    assert caught.value.reason == reason


def test_a_system_turn_makes_another_prompt(tmp_path):
    rows = [{"prompt": "Where is the lamp?"}]
    rows += [{**rows[0], "system": f"Be {how}."} for how in ("kind", "brief", "kind")]
    jsonl(tmp_path / "a.jsonl", *rows)
    jsonl(tmp_path / "b.jsonl", *reversed(rows))
    both = [draw(tmp_path, instructions(name)) for name in ("a.jsonl", "b.jsonl")]
    assert accounts(both[0]) == {("in", ""): 4, ("out", ""): 3, ("excluded", "repeated"): 1}
    assert sorted(both[0].prompts["prompt_id"].to_pylist()) == sorted(
        both[1].prompts["prompt_id"].to_pylist()
    )
    assert len(set(both[0].prompts["prompt_id"].to_pylist())) == 3
    assert len(set(both[0].prompts["prompt_group"].to_pylist())) == 1  # on one side of the split
    assert {row["text"] for row in both[0].prompts.to_pylist()} == {"Where is the lamp?"}
    said = {system_turn(row["messages"]) for row in both[0].prompts.to_pylist()}
    assert said == {None, "Be kind.", "Be brief."}


def test_bad_rows_are_set_apart_with_file_line_and_reason(tmp_path):
    path = jsonl(
        tmp_path / "bad.jsonl",
        {"prompt": "What is a river?"},
        "{not json",
        json.dumps({"prompt": "x" * 1_000_000}),
        {"prompt": ""},
        "[1]",
        json.dumps({"prompt": "\ud800"}),
        "",
        json.dumps({"prompt": "y" * 9_000_000}),
        {"prompt": "What is a lake?"},
    )
    with path.open("ab") as file:
        file.write(b'{"prompt": "\xff"}\n{"prompt": "What is the sea?"}\n')
    drawn = draw(tmp_path, instructions("bad.jsonl"))
    assert accounts(drawn)["out", ""] == 3
    bad = {row["row"]: row for row in drawn.quarantine.to_pylist()}
    assert sorted(bad) == [2, 3, 4, 5, 6, 8, 10]
    assert {row["file"] for row in bad.values()} == {"prompts of pool: set/bad.jsonl"}
    assert "not valid JSON" in bad[2]["problem"]
    assert "prompt of 1,000,000 characters, longer than 500,000" in bad[3]["problem"]
    assert "split it, or raise max_characters" in bad[3]["problem"]
    assert "9,000,015 bytes" in bad[8]["problem"]
    assert "surrogate" in bad[6]["problem"]
    assert "not valid UTF-8" in bad[10]["problem"]
    assert all(len(row["excerpt"]) <= 200 for row in bad.values())


def test_parquet_that_is_not_utf8_loses_only_its_bad_rows(tmp_path):
    raw = pa.array([b"What is a river?", b"\xff\xfe", b"What is a lake?"], pa.binary())
    texts = pa.StringArray.from_buffers(3, *raw.buffers()[1:])
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "p.parquet")
    drawn = draw(tmp_path, instructions("p.parquet"))
    assert [row["row"] for row in drawn.quarantine.to_pylist()] == [2]
    assert drawn.prompts.num_rows == 2


RIDDLE = (
    "A miller has four wagons of bread and sells one wagon each winter to the harbour master. "
    "How many wagons has he left after {} winters, and what does the harbour master eat then?"
)


def test_near_duplicates_share_a_group_and_nothing_else_does(tmp_path):
    rows = [RIDDLE.format(2), RIDDLE.format(2).replace("then?", "then, sir?"), "What is a lake?",
            "what is a LAKE", "What is a river?"]  # fmt: skip
    jsonl(tmp_path / "i.jsonl", *({"prompt": row} for row in rows))
    table = draw(tmp_path, instructions("i.jsonl")).prompts
    group = dict(zip(table["text"].to_pylist(), table["prompt_group"].to_pylist(), strict=True))
    assert group[rows[0]] == group[rows[1]]
    assert group[rows[2]] == group[rows[3]]
    assert len(set(group.values())) == 3


def test_a_group_never_changes_and_a_prompt_between_sides_is_kept_out(tmp_path):
    one, two = RIDDLE.format(2), RIDDLE.format(2).replace("then?", "then, sir?")
    jsonl(tmp_path / "i.jsonl", {"prompt": one})
    first = draw(tmp_path, instructions("i.jsonl")).prompts.to_pylist()[0]
    groups = {first["prompt_id"].bytes: "old"}
    jsonl(tmp_path / "i.jsonl", {"prompt": two}, {"prompt": one})
    both = draw(tmp_path, instructions("i.jsonl"), groups=groups).prompts
    assert set(both["prompt_group"].to_pylist()) == {"old"}
    assert set(both["split"].to_pylist()) == {side("prompt", "old", SPLIT)}

    sides = {side("prompt", name, SPLIT): name for name in "abcdefgh"}
    keys = [row["prompt_id"].bytes for row in both.to_pylist()]
    apart = dict(zip(keys, (sides["train"], sides["test"]), strict=True))
    three = RIDDLE.format(2).replace("then?", "then, miller?")
    jsonl(tmp_path / "i.jsonl", {"prompt": one}, {"prompt": two}, {"prompt": three})
    drawn = draw(tmp_path, instructions("i.jsonl"), groups=apart)
    assert accounts(drawn)["excluded", "between_sides"] == 1
    (listed,) = drawn.quarantine.to_pylist()
    assert (listed["row"], listed["field"]) == (3, "between_sides")
    assert set(drawn.prompts["prompt_group"].to_pylist()) == set(apart.values())


def test_what_evaluation_sets_know_is_kept_out_and_listed(tmp_path):
    known = RIDDLE.format(7)
    hidden = "Here is a tale. " + " ".join(known.split()[3:20]) + " and so on it goes for ever."
    near = known.replace("eat then?", "eat?")
    fine = "Tell me of the copper violin that hung in the garden by the river in winter."
    jsonl(
        tmp_path / "eval.jsonl",
        {"question": known},
        {"question": "今天下雨，明天也会下雨吗？请你告诉我"},
    )
    chinese = "请问：今天下雨，明天也会下雨吗？请你告诉我，谢谢！"
    rows = [{"prompt": text} for text in (known, hidden, near, fine, chinese)]
    jsonl(tmp_path / "i.jsonl", *rows)
    evaluation = [{"name": "riddles", "path": "eval.jsonl"}]
    drawn = draw(tmp_path, instructions("i.jsonl"), evaluation=evaluation)
    assert drawn.prompts["text"].to_pylist() == [fine]
    assert accounts(drawn)["excluded", "contaminated"] == 4
    listed = {row["row"]: row["problem"] for row in drawn.quarantine.to_pylist()}
    assert sorted(listed) == [1, 2, 3, 5]
    assert "shares 13 words with riddles (eval.jsonl, row 1): " in listed[2]
    assert "row 2" in listed[5]
    wide = draw(tmp_path, instructions("i.jsonl"), evaluation=evaluation, shared_words=1000)
    told = {row["row"]: row["problem"] for row in wide.quarantine.to_pylist()}
    assert told[1] == told[3] == "equal or near-equal to riddles (eval.jsonl, row 1)"
    assert 2 not in told


def test_runs_of_words_agree_with_a_slow_search():
    rng = random.Random(4)
    texts = [" ".join(rng.choices(NOUNS[:4], k=rng.randint(0, 30))) for _ in range(60)]
    known = [Known(text, str(n)) for n, text in enumerate(texts[40:])]
    found = shared_runs(texts[:40], known, 5)
    for number, text in enumerate(texts[:40]):
        runs = {tuple(words(text)[at : at + 5]) for at in range(len(words(text)) - 4)}
        slow = any(
            tuple(words(one.text)[at : at + 5]) in runs
            for one in known
            for at in range(len(words(one.text)) - 4)
        )
        assert (number in found) == slow


def test_near_groups_of_few():
    assert near_groups([], 0.8).tolist() == []
    assert near_groups(["a"], 0.8).tolist() == [0]
    assert near_groups(["a b c", "x", "A b c", "", " "], 0.8).tolist() == [0, 1, 0, 3, 4]


def test_planned_counts(tmp_path, tokenizer):
    jsonl(tmp_path / "i.jsonl", *({"prompt": str(n)} for n in range(7)))
    jsonl(tmp_path / "d.jsonl", *({"text": str(n)} for n in range(9)))
    files = [instructions("i.jsonl", limit=5), documents("d.jsonl")]
    settings = parse({"files": files, "tokenizer": "x"}, PromptSources, "test")
    assert planned(settings, tmp_path) == {"instruction": 5, "prefix": 9}
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write('{"text": "a last line that nothing ends"}')
    assert planned(settings, tmp_path) == {"instruction": 5, "prefix": 10}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"files": []}, "files"),
        ({"files": [documents("x")]}, "documents need a `tokenizer`"),
        ({"files": [instructions("x"), instructions("y")]}, "2 are named 'set'"),
        ({"files": [instructions("x", limt=3)]}, "did you mean 'limit'"),
        ({"files": [instructions("x")], "prefix_tokens": [9, 3]}, "prefix_tokens is 9 to 3"),
        ({"files": [instructions("x")], "tokeniser": "x"}, "did you mean 'tokenizer'"),
    ],
)
def test_a_section_that_cannot_be_meant(section, message):
    with pytest.raises(ConfigError, match=message):
        parse(section, PromptSources, "run.yaml: prompt_sources")


def test_files_that_are_no_use(tmp_path, monkeypatch):
    def unreachable(*_: Any) -> str:
        msg = "the hub cannot be reached"
        raise OSError(msg)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(BadInputError, match=r"gone.jsonl: no file there"):
        draw(tmp_path, instructions("gone.jsonl"))
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(BadInputError, match=r"x.csv: not one of .parquet"):
        draw(tmp_path, instructions("x.csv"))
    (tmp_path / "x.parquet").write_text("a")
    with pytest.raises(BadInputError, match="not a readable Parquet file"):
        draw(tmp_path, instructions("x.parquet"))
    jsonl(tmp_path / "i.jsonl", {"prompt": "a"})
    (tmp_path / "e.json").write_text("[]")
    with pytest.raises(BadInputError, match="evaluation set 'e' has no usable row"):
        draw(tmp_path, instructions("i.jsonl"), evaluation=[{"name": "e", "path": "e.json"}])
    jsonl(tmp_path / "d.jsonl", {"text": "a b"})
    with pytest.raises(BadInputError, match=r"no nowhere/tokenizer.json .*cannot be reached"):
        draw(tmp_path, documents("d.jsonl"), tokenizer="nowhere")


def test_ids_are_golden(tmp_path):
    jsonl(tmp_path / "i.jsonl", {"prompt": "What is a river?"})
    (row,) = draw(tmp_path, instructions("i.jsonl")).prompts.to_pylist()
    assert row["source_key"] == f"set/{ids.content_id('text', 'What is a river?').hex()}"
