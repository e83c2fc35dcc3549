"""Groups files are read whole or refused with the place and the fix; ids and batches follow."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.conftest import make_groups
from tests.trainer.test_template import TOKENIZERS
from trainer import ids_cache
from trainer.data import GROUPS_SCHEMA, read_groups, texts_of
from trainer.errors import BadGroupsError
from trainer.ids_cache import cached_ids
from trainer.packing import IdsBuilder, batches, costs, microbatches, shares, tokenise
from trainer.template import Limits, Template, common_prefix

OFFICIAL = {
    "prompt": [{"role": "user", "content": "What is the capital of China?"}],
    "reference": [{"role": "assistant", "content": "Beijing."}],
    "chosen": [{"role": "assistant", "content": "Beijing."}],
    "rejected": "Shanghai.",
}


def write_lines(path, *records):
    lines = (r if isinstance(r, bytes) else json.dumps(r).encode() for r in records)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_parquet_and_jsonl_hold_the_same_groups(tmp_path):
    table = make_groups(20)
    pq.write_table(table, tmp_path / "g.parquet")
    write_lines(tmp_path / "g.jsonl", *table.to_pylist())
    assert read_groups([tmp_path / "g.parquet"]).equals(table)
    assert read_groups([tmp_path / "g.jsonl"]).equals(table)
    both = read_groups([tmp_path / "g.parquet", tmp_path / "g.jsonl"])
    assert len(both) == 40


def test_the_official_jsonl_is_a_group_of_two(tmp_path):
    path = write_lines(tmp_path / "o.jsonl", OFFICIAL, {**OFFICIAL, "wrapper": "pretrain"})
    table = read_groups([path])
    assert table.column("wrapper").to_pylist() == ["sft", "pretrain"]
    [first, _] = texts_of(table)
    assert (first.prompt, first.reference) == ("What is the capital of China?", "Beijing.")
    assert list(first.candidates) == ["Beijing.", "Shanghai."]
    assert [c["rank"] for c in table.column("candidates").to_pylist()[0]] == [0, 1]


def test_other_widths_and_orders_of_the_same_columns_are_read(tmp_path):
    table = make_groups(5)
    candidates = table.schema.field("candidates").type.value_type
    wider = pa.list_(pa.struct([(f.name, f.type) for f in reversed(list(candidates))]))
    changed = table.set_column(4, "candidates", pa.array(table["candidates"].to_pylist(), wider))
    changed = changed.set_column(3, "reference", table["reference"].cast(pa.large_string()))
    changed = changed.append_column("more", pa.array(range(5))).select(
        [*reversed(GROUPS_SCHEMA.names), "more"]
    )
    pq.write_table(changed, tmp_path / "g.parquet")
    assert read_groups([tmp_path / "g.parquet"]).equals(table)


def test_columns_that_training_does_without_may_be_absent(tmp_path):
    table = make_groups(3).select(["group_id", "wrapper", "prompt", "reference", "candidates"])
    pq.write_table(table, tmp_path / "g.parquet")
    read = read_groups([tmp_path / "g.parquet"])
    assert read.column("split").to_pylist() == ["train"] * 3
    assert read.column("cell").null_count == 3


def broken_parquet(path, case):
    table = make_groups(4)
    rows = table.to_pylist()
    if case == "missing":
        table = table.drop(["reference"])
    elif case == "type":
        table = table.set_column(4, "candidates", pa.array([1, 2, 3, 4]))
    elif case == "null":
        rows[2]["candidates"][1]["text"] = None
        table = pa.Table.from_pylist(rows, GROUPS_SCHEMA)
    elif case == "wrapper":
        rows[3]["wrapper"] = "chat"
        table = pa.Table.from_pylist(rows, GROUPS_SCHEMA)
    elif case == "utf-8":
        raw = [None, pa.py_buffer(np.arange(0, 10, 2, np.int32)), pa.py_buffer(b"\xff\xfe" * 4)]
        table = table.set_column(3, "reference", pa.Array.from_buffers(pa.string(), 4, raw))
    pq.write_table(table, path)
    if case == "cut":
        path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("missing", "column 'reference' is missing; expected type string"),
        ("type", "column 'candidates' is int64; expected list<"),
        ("null", "row 2: candidates.text is null"),
        ("wrapper", "row 3: wrapper 'chat'; expected 'pretrain' or 'sft'"),
        ("utf-8", "Invalid UTF8"),
        ("cut", "not a readable Parquet file"),
    ],
)
def test_a_bad_parquet_file_is_refused_with_the_place(tmp_path, case, said):
    path = tmp_path / "bad.parquet"
    broken_parquet(path, case)
    with pytest.raises(BadGroupsError) as error:
        read_groups([path])
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["[{}, {}]", "[\n{}\n]"])
def test_one_list_of_all_rows_is_told_from_a_bad_line(tmp_path, text):
    path = tmp_path / "all.jsonl"
    path.write_text(text)
    with pytest.raises(BadGroupsError, match="line 1: .*; give one object a line, not one list"):
        read_groups([path])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "a", ', "not UTF-8 JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8 JSON"),
        (b"[1]", "list where an object is expected"),
        ({**OFFICIAL, "chosen": None}, "field 'chosen' is None"),
        ({k: v for k, v in OFFICIAL.items() if k != "rejected"}, "field 'rejected' is missing"),
        ({**OFFICIAL, "prompt": [{"role": "user"}]}, "field 'prompt' is [{'role': 'user'}]"),
        (rb'{"prompt": "\ud800", "reference": "r"}', r"field 'prompt' is '\ud800'"),
        ({**OFFICIAL, "candidates": [{"text": "x"}]}, "candidate rank None"),
        ({**OFFICIAL, "candidates": "x"}, "field 'candidates' must be a list"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line, said):
    path = write_lines(tmp_path / "bad.jsonl", OFFICIAL, b"", line)
    with pytest.raises(BadGroupsError) as error:
        read_groups([path])
    assert said in str(error.value)
    assert f"{path}: line 3" in str(error.value)


def test_missing_and_unknown_files_are_refused(tmp_path):
    with pytest.raises(BadGroupsError, match="no such file"):
        read_groups([tmp_path / "none.parquet"])
    (tmp_path / "g.csv").write_text("x")
    with pytest.raises(BadGroupsError, match="unknown kind of file '.csv'"):
        read_groups([tmp_path / "g.csv"])


def test_tokenise_counts_what_it_leaves_out(tmp_path):
    rows = make_groups(10).to_pylist()
    for candidate in rows[0]["candidates"]:
        candidate["rank"] = 1
    long = "the same beginning " * 60
    rows[1]["candidates"] = [{"text": long + end, "rank": i} for i, end in enumerate("ab")]
    write_lines(tmp_path / "g.jsonl", *rows)
    template = Template(TOKENIZERS["byte-level"], Limits(256, 64))
    ids, counts = tokenise([tmp_path / "g.jsonl"], template)
    assert counts == {"read": 10, "kept": 6, "other_split": 2, "no_pair": 1, "equal_ids": 1}
    assert len(ids) == 6
    assert ids.group_ids == [f"g{i}" for i in (2, 3, 5, 6, 7, 8)]


def test_ids_give_back_every_sequence():
    template = Template(TOKENIZERS["byte-level"])
    table = make_groups(8, k=4)
    encoded = template.encode(texts_of(table), one_prompt=True)
    builder = IdsBuilder()
    for group, sequences in enumerate(encoded):
        builder.add(sequences, [group, 1, 2, 3], str(group))
    ids = builder.build()
    for group, sequences in enumerate(encoded):
        prefix = ids.prefix(group).tolist()
        assert len(prefix) == common_prefix(sequences) > 5
        assert [prefix + s.tolist() for s in ids.suffixes(group)] == sequences
        assert ids.group_ranks(group).tolist() == [group, 1, 2, 3]
        assert ids.lengths()[group] == max(map(len, sequences))


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=200),
    st.integers(1, 20),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_an_epoch_holds_every_group_once_and_depends_on_seed_and_epoch(lengths, size, seed, epoch):
    lengths = np.asarray(lengths)
    plan = batches(lengths, size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(plan)) == list(range(len(lengths)))
    assert max(map(len, plan)) <= size
    again = batches(lengths, size, seed=seed, epoch=epoch)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))


def test_epochs_differ_and_lengths_go_together():
    lengths = np.random.default_rng(0).integers(10, 500, 1000)
    first, second = (batches(lengths, 16, seed=0, epoch=e) for e in (0, 1))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    spread = np.mean([lengths[b].max() - lengths[b].min() for b in first])
    assert spread < 100


@settings(deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=60), st.integers(1, 3000))
def test_parts_of_a_batch_fit_the_budget(sizes, budget):
    sizes = np.asarray(sizes)
    parts = microbatches(sizes, budget, padded=True)
    assert sorted(np.concatenate(parts)) == list(range(len(sizes)))
    assert all(len(p) == 1 or sizes[p].max() * len(p) <= budget for p in parts)
    parts = microbatches(sizes, budget, padded=False)
    assert sorted(np.concatenate(parts)) == list(range(len(sizes)))
    assert all(len(p) == 1 or sizes[p].sum() <= budget for p in parts)
    loads = sorted(int(sizes[p].sum()) for p in parts)
    assert len(loads) < 2 or loads[0] + loads[1] > budget  # no two parts would fit together


@settings(deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=40), st.integers(1, 4))
def test_processes_share_a_step_by_cost(sizes, processes):
    sizes = np.asarray(sizes)
    parts = shares(sizes, processes)
    assert sorted(np.concatenate(parts)) == list(range(len(sizes)))
    loads = [int(sizes[p].sum()) for p in parts]
    assert max(loads) - min(loads) <= sizes.max()


def test_costs_are_what_a_layout_runs():
    builder = IdsBuilder()
    builder.add([[1, 2, 3, 4, 9], [1, 2, 3, 5, 6, 7]], [0, 1], "a")  # three shared, 2 and 3 own
    builder.add([[7, 8], [6, 8], [5, 8]], [0, 1, 1], "b")  # nothing shared
    ids = builder.build()
    assert ids.distinct().tolist() == [3 + 2 + 3, 6]
    assert ids.official().tolist() == [5 + 6, 2 * 2 + 2 + 2]
    assert ids.seen().tolist() == [6 + (3 * 2 + 3) + (3 * 3 + 6), 3 * 3]
    assert costs(ids, "shared", 8).tolist() == [8 + 30 / 48, 6 + 9 / 48]
    assert costs(ids, "separate", 8).tolist() == [2 * (6 + 18 / 48), 3 * (2 + 2 / 48)]


def test_ids_are_made_once_and_mapped_afterwards(tmp_path, monkeypatch):
    groups, cache = tmp_path / "data" / "g.parquet", tmp_path / "cache"
    groups.parent.mkdir()
    pq.write_table(make_groups(10), groups)
    template = Template(TOKENIZERS["byte-level"])
    made, counts = tokenise([groups], template)
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return tokenise(*args, **kwargs)

    monkeypatch.setattr(ids_cache, "tokenise", counted)

    def found():
        ids, again = cached_ids([groups], template, cache)
        assert again == counts
        assert ids.group_ids == made.group_ids
        assert ids.digest() == made.digest()
        return len(calls)

    assert [found(), found()] == [1, 1]
    [file] = cache.iterdir()
    assert list(groups.parent.iterdir()) == [groups]
    whole = file.read_bytes()
    at = whole.index(made.tokens.tobytes()) + 40
    for damaged in (whole[:-100], b"", whole[:at] + b"\x07" + whole[at + 1 :]):
        file.unlink()
        file.write_bytes(damaged)
        before = len(calls)
        assert [found(), found()] == [before + 1, before + 1]
    cached_ids([groups], Template(TOKENIZERS["byte-level"], Limits(256, 64)), cache)
    cached_ids([groups], Template(TOKENIZERS["metaspace-first"]), cache)
    cached_ids([groups], template, cache, split="eval")
    pq.write_table(make_groups(11), groups)
    cached_ids([groups], template, cache)
    assert len(list(cache.iterdir())) == 5
