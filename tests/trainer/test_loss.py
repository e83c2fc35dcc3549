"""The Bradley-Terry loss against its formula, and the learning rate's path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.loss import bradley_terry
from trainer.optim import learning_rate
from trainer.settings import TrainSettings

groups = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-20, 20, width=32)), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)


@given(groups)
def test_it_is_the_sum_over_all_ordered_pairs_of_each_group(values):
    scores = torch.tensor([score for group in values for _, score in group])
    sums = bradley_terry(scores, [np.asarray([rank for rank, _ in g]) for g in values])
    pairs = [(a, b) for group in values for i, a in group for j, b in group if i < j]
    assert sums.pairs == len(pairs)
    expected = sum(math.log1p(math.exp(-abs(a - b))) + max(b - a, 0) for a, b in pairs)
    assert float(sums.loss) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert sums.correct == sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
    assert sums.margin == pytest.approx(sum(a - b for a, b in pairs), rel=1e-4, abs=1e-3)


def test_huge_margins_stay_finite():
    scores = torch.tensor([1e4, -1e4], requires_grad=True)
    for ranks in ([0, 1], [1, 0]):
        sums = bradley_terry(scores, [np.asarray(ranks)])
        sums.loss.backward()
        assert torch.isfinite(sums.loss)
        assert torch.isfinite(scores.grad).all()


def test_the_rate_rises_in_a_line_and_falls_to_the_floor():
    settings = TrainSettings(lr=2.0, floor=0.1, warmup=0.2)
    assert learning_rate(0.1, settings) == pytest.approx(1.0)
    assert learning_rate(0.2, settings) == pytest.approx(2.0)
    assert learning_rate(0.6, settings) == pytest.approx(1.1)
    assert learning_rate(1.0, settings) == pytest.approx(0.2)
    assert learning_rate(7.0, settings) == pytest.approx(0.2)
    rates = [learning_rate(x, settings) for x in np.linspace(0.2, 1, 50)]
    assert rates == sorted(rates, reverse=True)
