"""Rates of drawing: shares land where they should, as far as there are pairs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.budget import BINS, KINDS, Budget, draw_rates

SAME, SIBLING, OTHER, AMBIGUOUS, PROMPTS = range(len(KINDS))

tallies = st.dictionaries(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 3),
        st.sampled_from([SAME, SIBLING, OTHER, AMBIGUOUS]),
        st.integers(0, BINS - 1),
    ),
    st.integers(1, 10_000),
)


def with_prompts(found, each=7):
    return found | {(source, cell, PROMPTS, 0): each for source, cell, _, _ in found}


def expected(found, rates, kinds, **where):
    """Expected pairs kept, of these kinds, in a source or cell."""
    return sum(
        rows * rates[key]
        for key, rows in found.items()
        if key[2] in kinds
        and where.get("cell", key[1]) == key[1]
        and where.get("source", key[0]) == key[0]
    )


@given(tallies, st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_cell_with_both_labels_in_one_source_gets_a_share_within_bounds(found, matched):
    rates = draw_rates(with_prompts(found), Budget(length_matched=matched))
    assert rates.keys() == found.keys()
    assert all(0 <= rate <= 1 + 1e-9 for rate in rates.values())
    for cell in range(4):
        sources = {
            source
            for source in "abc"
            if {SAME} & (kinds := {k for s, c, k, _ in found if (s, c) == (source, cell)})
            and {SIBLING, OTHER} & kinds
        }
        for source in sources:
            same = expected(found, rates, {SAME}, cell=cell, source=source)
            cross = expected(found, rates, {SIBLING, OTHER}, cell=cell, source=source)
            assert 0.12 - 1e-6 <= same / (same + cross) <= 0.5 + 1e-6
        if sources:
            same = expected(found, rates, {SAME}, cell=cell)
            cross = expected(found, rates, {SIBLING, OTHER}, cell=cell)
            assert 0.05 < same / (same + cross) < 0.6 + 1e-6
            kept = expected(found, rates, {AMBIGUOUS}, cell=cell)
            assert kept <= 0.05 * (same + cross) + 1e-6


def test_siblings_get_their_part_and_lengths_their_bins():
    found = {
        ("s", 0, SAME, 9): 90,
        ("s", 0, SAME, 2): 30,
        ("s", 0, SIBLING, 9): 1000,
        ("s", 0, OTHER, 9): 5000,
        ("s", 0, OTHER, 2): 5000,
        ("s", 0, PROMPTS, 0): 10,
    }
    rates = draw_rates(found, Budget(same_policy_share=0.12, sibling_share=0.25))
    cross = 120 * 0.88 / 0.12
    assert rates["s", 0, SAME, 9] == rates["s", 0, SAME, 2] == 1
    assert 1000 * rates["s", 0, SIBLING, 9] == pytest.approx(0.25 * cross)
    assert 5000 * rates["s", 0, OTHER, 9] == pytest.approx(0.75 * cross * 0.75)
    assert 5000 * rates["s", 0, OTHER, 2] == pytest.approx(0.75 * cross * 0.25)
    loose = draw_rates(found, Budget(length_matched=False))
    assert loose["s", 0, OTHER, 9] == pytest.approx(loose["s", 0, OTHER, 2])


def test_scarce_bins_overflow_into_the_others():
    found = {
        ("s", 0, SAME, 9): 100,
        ("s", 0, OTHER, 9): 10,
        ("s", 0, OTHER, 0): 10_000,
        ("s", 0, PROMPTS, 0): 10,
    }
    rates = draw_rates(found, Budget(same_policy_share=0.2))
    assert rates["s", 0, OTHER, 9] == 1
    assert 10_000 * rates["s", 0, OTHER, 0] == pytest.approx(390)


def test_a_source_with_one_label_keeps_few_and_cannot_carry_the_share_away():
    alone = {("single", 0, OTHER, 5): 100_000, ("single", 0, PROMPTS, 0): 20}
    assert draw_rates(alone, Budget())["single", 0, OTHER, 5] == pytest.approx(2000 / 100_000)
    beside = alone | {
        ("s", 0, SAME, 5): 12,
        ("s", 0, OTHER, 5): 880,
        ("s", 0, PROMPTS, 0): 20,
    }
    rates = draw_rates(beside, Budget())
    assert 100_000 * rates["single", 0, OTHER, 5] == pytest.approx(0.25 * 100)
