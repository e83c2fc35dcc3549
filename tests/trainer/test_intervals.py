"""Intervals: exact against brute force, right coverage by simulation, fall-backs that say so."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from trainer import intervals
from trainer.intervals import resample, wilson


def crossed(prompts: int, policies: int) -> tuple[np.ndarray, np.ndarray]:
    return np.divmod(np.arange(prompts * policies), policies)


def test_replicates_equal_brute_force_over_the_same_draws():
    rng = np.random.default_rng(3)
    n = 60
    values = rng.integers(0, 3, (n, 2)) / 2
    prompts, policies = rng.integers(7, size=n), rng.integers(4, size=n)
    got = resample(values, prompts, policies, resamples=50, seed=11)

    drawn_prompts = np.random.default_rng([11, 0]).integers(7, size=(50, 7))
    drawn_policies = np.random.default_rng([11, 1]).integers(4, size=(50, 4))
    expected = []
    for some_prompts, some_policies in zip(drawn_prompts, drawn_policies, strict=True):
        rows = [
            row
            for p in some_prompts
            for q in some_policies
            for row in np.flatnonzero((prompts == p) & (policies == q))
        ]
        if rows:
            expected.append(values[rows].mean(axis=0))
    np.testing.assert_allclose(got.replicates, expected, atol=1e-12)
    low, high = np.quantile(np.array(expected)[:, 0], [0.025, 0.975])
    interval = got.mean(0)
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert interval.method == intervals.TWO_WAY
    assert (interval.n, interval.clusters) == (60, 4)
    paired = np.array(expected)[:, 0] - np.array(expected)[:, 1]
    difference = got.difference(0, 1)
    assert (difference.low, difference.high) == pytest.approx(
        tuple(np.quantile(paired, [0.025, 0.975]))
    )


@pytest.mark.parametrize(("prompt_sd", "policy_sd"), [(0.5, 0.5), (0.0, 0.6), (0.6, 0.0)])
def test_coverage_where_prompts_and_policies_differ(prompt_sd, policy_sd):
    """Nominal 95 %; cautious, so more is right and clearly less is wrong."""
    rng = np.random.default_rng(0)
    prompts, policies = crossed(40, 20)
    truth = norm.cdf(0.6 / np.sqrt(1 + prompt_sd**2 + policy_sd**2))
    covered = []
    for seed in range(150):
        tilt = 0.6 + rng.normal(0, prompt_sd, 40)[prompts] + rng.normal(0, policy_sd, 20)[policies]
        right = (rng.random(800) < norm.cdf(tilt)).astype(float)
        interval = resample(right[:, None], prompts, policies, resamples=200, seed=seed).mean(0)
        covered.append(interval.low <= truth <= interval.high)
    assert np.mean(covered) > 0.89


def test_without_cluster_effects_it_is_wider_than_needed_but_not_twice():
    rng = np.random.default_rng(1)
    prompts, policies = crossed(60, 30)
    right = (rng.random(1800) < 0.7).astype(float)
    interval = resample(right[:, None], prompts, policies, resamples=1000).mean(0)
    naive = 2 * 1.96 * np.sqrt(0.7 * 0.3 / 1800)
    assert naive < interval.high - interval.low < 2 * naive


def test_one_policy_group_resamples_prompts_only_and_says_so():
    values = np.array([[1.0], [0.0], [1.0], [1.0]])
    interval = resample(values, ["a", "a", "b", "c"], ["x"] * 4).mean(0)
    assert (interval.method, interval.clusters) == (intervals.PROMPTS, 3)
    other = resample(values, ["x"] * 4, ["a", "a", "b", "c"]).mean(0)
    assert (other.method, other.clusters) == (intervals.POLICIES, 3)
    assert (interval.low, interval.high) == (other.low, other.high)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_when_all_agree_it_is_wilson_over_clusters(share):
    prompts, policies = crossed(30, 12)
    interval = resample(np.full((360, 1), share), prompts, policies).mean(0)
    assert interval.method == intervals.WILSON
    assert (interval.low, interval.high) == wilson(share, 12)
    assert interval.high - interval.low > 0.1


def test_difference_of_two_that_always_agree_or_never_do():
    prompts, policies = crossed(10, 10)
    values = np.column_stack([np.ones(100), np.zeros(100), np.ones(100)])
    got = resample(values, prompts, policies)
    assert got.difference(0, 1).value == 1
    assert 0 < got.difference(0, 1).low < got.difference(0, 1).high == 1
    same = got.difference(0, 2)
    assert same.value == 0
    assert same.low < 0 < same.high


def test_a_single_comparison_tells_next_to_nothing():
    interval = resample(np.ones((1, 1)), [0], [0]).mean(0)
    assert (interval.method, interval.clusters, interval.n) == (intervals.WILSON, 1, 1)
    assert interval.low < 0.25


def test_wilson_equals_scipy():
    for right, n in ((0, 5), (3, 7), (50, 50), (61, 100)):
        expected = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((expected.low, expected.high))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_bounds_hold_the_range_and_do_not_depend_on_order_or_names(data):
    n = data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values = rng.integers(0, 3, (n, 2)) / 2
    prompts, policies = rng.integers(5, size=n), rng.integers(3, size=n)
    got = resample(values, prompts, policies, resamples=50)
    order = rng.permutation(n)
    named = np.array(["a", "b", "c", "d", "e"])
    again = resample(values[order], named[prompts[order]], named[policies[order]], resamples=50)
    for column in (0, 1):
        interval = got.mean(column)
        assert 0 <= interval.low <= interval.high <= 1
        other = again.mean(column)
        assert (interval.low, interval.high) == pytest.approx((other.low, other.high))
    assert got.difference(0, 1).value == pytest.approx(-got.difference(1, 0).value)
    assert got.difference(0, 1).low == pytest.approx(-got.difference(1, 0).high)


def test_large_inputs_are_resampled_in_parts_alike(monkeypatch):
    rng = np.random.default_rng(0)
    values, prompts, policies = rng.random((500, 1)), np.arange(500) // 2, np.arange(500) % 9
    whole = resample(values, prompts, policies, resamples=40)
    monkeypatch.setattr(intervals, "_CHUNK", 500 * 7)
    parts = resample(values, prompts, policies, resamples=40)
    np.testing.assert_allclose(whole.replicates, parts.replicates)


def test_no_comparisons_is_a_fault():
    with pytest.raises(ValueError, match="0 values"):
        resample(np.empty((0, 1)), [], [])
