"""Policy groups: valid, exactly balanced, in their cells, the same whatever the chunks."""

from collections import Counter
from random import Random

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import schemas
from pipelines.balance import blind_bound, policy_balance
from pipelines.blocks import Draw, Rows, cut, once, parts
from pipelines.group_rows import counts_table
from pipelines.groups import GroupSettings, cap, draft, make_groups
from pipelines.labels import read_answers
from tests.pipelines.answers import Answer, answers_table, worlds


def drafted(answers, config, capped=True):
    """Groups and counts of a world, without Beam."""
    counts = Counter()
    table = draft(read_answers(answers_table(answers)), config, 7, counts)
    return (cap(table, config, counts) if capped else table), counts


def world(prompts=10, runs=4, steps=3, samples=4):
    """Runs of three checkpoints; the last run is held out, every third prompt too."""
    return [
        Answer(
            prompt=f"p{p}",
            policy=f"run{r}@{s}",
            sample=n,
            text="word " * ((r + 2 * s + n + p) % 7) + f"{p} {r} {s} {n}",
            group=f"run{r}",
            family=f"fam{r // 2}",
            step=s,
            policy_side="test" if r == runs - 1 else "train",
            prompt_side="test" if p % 3 == 0 else "train",
        )
        for p in range(prompts)
        for r in range(runs)
        for s in range(steps)
        for n in range(samples)
    ]


configs = st.builds(
    GroupSettings,
    candidates=st.sampled_from([2, 3, 4, 16]),
    rounds=st.integers(1, 3),
    sibling_share=st.sampled_from([0.0, 0.5, 1.0]),
    length_matched_share=st.sampled_from([0.0, 0.5]),
    require_same_sampling=st.booleans(),
    seen_eval_share=st.sampled_from([0.0, 0.3]),
    train_groups=st.sampled_from([None, 5]),
    eval_groups_per_cell=st.sampled_from([5, 100]),
)


@given(worlds(prompts=2, samples=4), configs)
@settings(max_examples=40, deadline=None)
def test_every_group_is_fair(answers, config):
    groups, _ = drafted(answers, config)
    known = {r.id: r for r in answers}
    held = set()
    for row in groups.to_pylist():
        reference = known[row["reference"].bytes]
        members = [known[c["trajectory_id"].bytes] for c in row["candidates"]]
        positive, negatives = members[0], members[1:]
        assert [c["rank"] for c in row["candidates"]] == [0] + [1] * len(negatives)
        assert row["prompt_id"].bytes == reference.prompt_id
        assert {m.prompt_id for m in members} == {reference.prompt_id}
        assert 1 <= len(negatives) < config.candidates
        assert positive.policy == reference.policy
        assert positive.id != reference.id
        assert len({m.policy for m in members}) == len(members)
        everyone = [reference, *members]
        assert not any(m.empty or "unknown:" in m.policy for m in everyone)
        assert len({m.words for m in everyone}) == len(everyone)
        clusters = [m.cluster for m in everyone if m.cluster]
        assert len(set(clusters)) == len(clusters)
        if config.require_same_sampling:
            assert positive.sampling == reference.sampling
        for c, m in zip(row["candidates"], members, strict=True):
            assert c["policy_id"].bytes == m.policy_id
            if m.policy == reference.policy:
                assert c["relation"] == "same"
            elif m.group == reference.group:
                assert (c["relation"], m.step != reference.step) == ("sibling", True)
                assert None not in (m.step, reference.step)
            else:
                kin = "same_family" if m.family == reference.family else "other_family"
                assert c["relation"] == kin
        (side,) = {m.policy_side for m in everyone}
        assert row["cell"] == schemas.cell_of(reference.prompt_side, side)
        assert row["split"] == "eval" or row["cell"] == "seen"
        if row["split"] == "eval" and row["cell"] == "seen":
            held.add(reference.id)
    for row in groups.filter(pc.field("split") == "train").to_pylist():
        used = {row["reference"].bytes, *(c["trajectory_id"].bytes for c in row["candidates"])}
        assert not used & held


@given(worlds(prompts=3, samples=4), configs)
@settings(max_examples=40, deadline=None)
def test_candidates_alone_tell_nothing(answers, config):
    groups, _ = drafted(answers, config)
    for row in blind_bound(groups).to_pylist():
        assert (row["unmirrored"], row["bound"]) == (0, 0.5)
    for split in schemas.SPLITS:
        for row in policy_balance(groups.filter(pc.field("split") == split)).to_pylist():
            assert row["positive"] == row["negative"] > 0
    keys = groups["group_id"].to_pylist()
    assert len(set(keys)) == len(keys)


@given(worlds(), configs)
@settings(max_examples=25, deadline=None)
def test_the_books_balance(answers, config):
    groups, counts = drafted(answers, config)
    for (source, kind, split, cell), rows in Counter(
        zip(*(groups[n].to_pylist() for n in ("source", "kind", "split", "cell")), strict=True)
    ).items():
        counts[source, "out", kind, "", "train" if split == "train" else cell] += rows
    table = counts_table(counts)  # raises where they do not
    cells = {(r.prompt_id, r.policy) for r in answers}
    policies = table.filter((pc.field("label") == "policies") & (pc.field("what") == "in"))
    assert sum(policies["rows"].to_pylist()) == len(cells)


def test_beam_gives_the_same_groups_whatever_the_chunks(tmp_path):
    source = tmp_path / "answers.parquet"
    pq.write_table(answers_table(world()), source)
    config = GroupSettings(train_groups=40, eval_groups_per_cell=12, sibling_groups_per_cell=6)
    results = [
        make_groups(source, config, tmp_path / str(size), snapshot=7, chunk_pairs=size)
        for size in (1, 10**9)
    ]
    (groups, counts), (again, counts_again) = results
    assert groups.schema.equals(schemas.GROUPS.schema)
    assert counts.schema.equals(schemas.COUNTS.schema)
    order = sorted(range(len(groups)), key=lambda i: groups["group_id"][i].as_py())
    other = sorted(range(len(again)), key=lambda i: again["group_id"][i].as_py())
    assert groups.take(pa.array(order)).to_pylist() == again.take(pa.array(other)).to_pylist()
    assert counts.to_pylist() == counts_again.to_pylist()
    sizes = Counter((r["split"], r["cell"]) for r in groups.to_pylist())
    assert sizes.keys() == {("train", "seen"), *(("eval", cell) for cell in schemas.CELLS)}
    assert 40 <= sizes["train", "seen"] < 44
    assert all(rows < 12 + 4 + 6 + 2 for place, rows in sizes.items() if place[0] == "eval")
    assert set(groups["snapshot"].to_pylist()) == {7}


def test_few_groups_still_come_from_many_prompts():
    config = GroupSettings(train_groups=24, seen_eval_share=0)
    groups, _ = drafted(world(), config)
    train = groups.filter(pc.field("split") == "train")
    assert len(set(train["prompt_id"].to_pylist())) == 6


def test_siblings_meet_and_are_measured_apart():
    def share(config):
        groups, _ = drafted(world(), config, capped=False)
        found = groups.filter((pc.field("kind") == "groups") & (pc.field("split") == "train"))
        relations = Counter(c["relation"] for g in found["candidates"].to_pylist() for c in g)
        return relations["sibling"] / (relations.total() - relations["same"])

    assert share(GroupSettings(sibling_share=1)) > 0.35
    assert share(GroupSettings(sibling_share=0, length_matched_share=0)) < 0.3
    groups, _ = drafted(world(), GroupSettings())
    siblings = groups.filter(pc.field("kind") == "siblings").to_pylist()
    assert {(r["split"], r["cell"]) for r in siblings} == {("eval", c) for c in schemas.CELLS}
    assert all([c["relation"] for c in r["candidates"]] == ["same", "sibling"] for r in siblings)


def test_length_matched_blocks_hold_alike_lengths():
    def spread(config):
        groups, _ = drafted(world(), config, capped=False)
        length = {r.id: len(r.words) for r in world()}
        ranges = []
        for row in groups.filter(pc.field("split") == "train").to_pylist():
            sizes = [length[c["trajectory_id"].bytes] for c in row["candidates"]]
            ranges.append(max(sizes) - min(sizes))
        return sum(ranges) / len(ranges)

    matched = spread(GroupSettings(sibling_share=0, length_matched_share=1))
    assert matched < 0.6 * spread(GroupSettings(sibling_share=0, length_matched_share=0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([{}], "one_sample"),
        ([{}, {"empty": True}], "empty"),
        ([{"text": "a"}, {"text": "a"}], "ambiguous"),
        ([{"cluster": "c"}, {"cluster": "c"}], "ambiguous"),
        ([{}, {"sampling": "greedy"}], "sampling"),
        ([{"policy": "unknown:made"}, {"policy": "unknown:made"}], "unknown_policy"),
        ([{}, {}], ""),
    ],
)
def test_a_policy_that_cannot_be_the_positive_says_why(changes, reason):
    answers = [
        Answer(**{"prompt": "p", "policy": "A", "sample": n, **fields})
        for n, fields in enumerate(changes)
    ]
    x = read_answers(answers_table(answers))
    draws, why = parts(Rows(x), range(len(x)), same_sampling=True)
    assert (why, bool(draws)) == (reason, not reason)


def test_related_policies_never_meet_and_copies_wait_for_another_block():
    policies = [("A", None, ""), ("A-terse", None, ""), ("B", 1, "same words"), ("C", 1, "")]
    answers = [
        Answer(prompt="p", policy=name, sample=n, group=name[0], step=step, text=text if n else "")
        for name, step, text in policies
        for n in range(2)
    ] + [Answer(prompt="p", policy="D", sample=n, text="same words"[: 10 * n]) for n in range(2)]
    x = read_answers(answers_table(answers))
    rows = Rows(x)
    own = {}
    for row, policy in enumerate(rows.policy):
        own.setdefault(policy, []).append(row)
    order = [Draw(*found) for found in own.values()]
    for seed in range(20):
        Random(seed).shuffle(order)
        for block in cut(rows, list(order), 5):
            groups = [rows.group[draw.reference] for draw in block]
            assert len(set(groups)) == len(groups)
            texts = [rows.text[row] for draw in block for row in draw]
            assert len(set(texts)) == len(texts)


def test_a_block_that_repeats_a_group_leaves_whole():
    first = [Draw(0, 1), Draw(2, 3)]
    mixed = [Draw(0, 1), Draw(4, 3)]
    fresh = [Draw(1, 0), Draw(3, 2)]
    kept, repeated = once([first, mixed, fresh, first], set())
    assert (kept, repeated) == ([first, fresh], [mixed, first])
