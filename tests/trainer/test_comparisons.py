"""Groups become items and comparisons; references are shuffled as said."""

import numpy as np
import pyarrow as pa
import pytest

from tests.trainer.style_world import discrimination, group, preference
from trainer.comparisons import UNCATEGORISED, choose, compare, read_rows, shuffle_references
from trainer.data import GROUPS_SCHEMA
from trainer.errors import TrainerError


def table(*rows) -> pa.Table:
    return pa.Table.from_pylist(list(rows), GROUPS_SCHEMA)


def test_every_two_candidates_of_different_rank_are_compared_once():
    ranked = [("a", 0, 1, "same"), ("b", 1, 2, "sibling"), ("c", 1, 3, ""), ("d", 2, 4, None)]
    found = compare(read_rows(table(group(0, "sft", "q", "r", ranked))))
    texts = [item["output"] for item in found.items]
    pairs = {(texts[w], texts[x]) for w, x in zip(found.winner, found.loser, strict=True)}
    assert pairs == {("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")}
    assert len(found) == 5
    assert found.sibling.sum() == 1
    assert set(found.category) == {UNCATEGORISED}
    item = found.items[0]
    assert item["prompt"] == [{"role": "user", "content": "q"}]
    assert (item["reference"], item["wrapper"]) == ("r", "sft")


def test_outcomes_count_ties_one_half_in_fp32():
    found = compare(read_rows(table(group(0, "sft", "q", "r", [("a", 0, 1, ""), ("b", 1, 1, "")]))))
    assert found.outcomes(np.array([1.0, 0.0])) == [1]
    assert found.outcomes(np.array([0.0, 1.0])) == [0]
    assert found.outcomes(np.array([1.0, 1.0 + 1e-12])) == [0.5]


def test_groups_without_clusters_count_equal_prompts_as_one():
    bare = {"prompt_group": None, "policy_group": None, "cell": None}
    pair = [("a", 0, 1, ""), ("b", 1, 1, "")]
    rows = [group(i, "sft", f"q{i // 2}", "r", pair, **bare) for i in range(4)]
    found = compare(read_rows(table(*rows)))
    assert list(found.prompt) == ["q0", "q0", "q1", "q1"]
    assert set(found.policy) == {"unknown"}


def test_a_missing_column_is_named():
    with pytest.raises(TrainerError, match="reference"):
        read_rows(discrimination(5).drop_columns("reference"))


def test_choice_is_bounded_by_cell_and_independent_of_order():
    groups = discrimination(200)
    chosen, remarks = choose(groups, "pretrain", "eval", 10, by_cell=True)
    cells = [row["cell"] for row in chosen]
    assert max(cells.count(cell) for cell in set(cells)) == 10
    assert len(remarks) == len(set(cells))
    assert "10 of" in remarks[0]
    order = np.random.default_rng(0).permutation(groups.num_rows)
    again, _ = choose(groups.take(order), "pretrain", "eval", 10, by_cell=True)
    assert [row["group_id"] for row in again] == [row["group_id"] for row in chosen]
    assert choose(groups, "sft", "eval", 10, by_cell=True) == ([], [])


def test_shuffled_references_come_from_another_policy_of_the_prompt_where_possible():
    rows = read_rows(discrimination(300))
    references, kept = shuffle_references(rows)
    policy_of = {row["reference"]: row["policy_group"] for row in rows}
    prompt_of = {row["reference"]: row["prompt_group"] for row in rows}
    same_prompt = 0
    for row, reference in zip(rows, references, strict=True):
        assert reference != row["reference"]
        assert reference not in [c["text"] for c in row["candidates"]]
        if prompt_of[reference] == row["prompt_group"]:
            same_prompt += 1
            assert policy_of[reference] != row["policy_group"]
    assert same_prompt == kept > 200


def test_shuffled_references_of_one_policy_come_from_other_prompts():
    rows = read_rows(preference(20))
    references, kept = shuffle_references(rows)
    prompt_of = {row["reference"]: row["prompt_group"] for row in rows}
    assert kept == 0
    assert all(prompt_of[r] != row["prompt_group"] for r, row in zip(references, rows, strict=True))


def test_only_keeps_the_items_that_its_comparisons_need():
    found = compare(read_rows(discrimination(30)))
    mask = np.arange(len(found)) % 5 == 0
    some = found.only(mask)
    for name in ("winner", "loser"):
        expected = [found.items[i]["output"] for i in getattr(found, name)[mask]]
        assert [some.items[i]["output"] for i in getattr(some, name)] == expected
    assert len(some.items) < len(found.items)
