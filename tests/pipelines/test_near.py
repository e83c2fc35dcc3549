"""Buckets and their candidates: all pairs of small ones, linear work in large ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.near import DedupSettings, band_keys, candidates


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 1000))
def test_small_buckets_give_all_their_pairs(keys, seed):
    texts = np.random.default_rng(seed).permutation(len(keys))
    left, right = candidates(np.array(keys, np.uint64), texts, limit=64)
    bucket = dict(zip(texts.tolist(), keys, strict=True))
    expected = {
        (a, b) for a in range(len(keys)) for b in range(a + 1, len(keys)) if bucket[a] == bucket[b]
    }
    assert set(zip(left.tolist(), right.tolist(), strict=True)) == expected
    assert len(left) == len(expected)


def test_large_buckets_give_the_smallest_and_the_next_ones():
    texts = np.arange(1000)[::-1].copy()
    left, right = candidates(np.zeros(1000, np.uint64), texts, limit=10)
    pairs = set(zip(left.tolist(), right.tolist(), strict=True))
    assert {(0, 999), (500, 501), (500, 509)} <= pairs
    assert (500, 510) not in pairs
    assert len(left) == len(pairs) < 1000 * 10


def test_texts_share_a_key_where_a_band_is_equal():
    values = np.random.default_rng(0).integers(0, 2**32, (50, 128), np.uint64).astype(np.uint32)
    values[1, 8:16] = values[0, 8:16]  # the second of 16 bands
    keys = band_keys(values, 16, 8)
    assert keys.shape == (16, 50)
    assert np.flatnonzero(keys[:, 0] == keys[:, 1]).tolist() == [1]
    assert len(np.unique(keys)) == keys.size - 1


@pytest.mark.parametrize("permutations", [112, 128])
def test_bands_are_datasketchs_and_find_what_they_promise(permutations):
    bands, rows = DedupSettings(permutations=permutations).bands()
    assert bands * rows <= permutations
    assert 1 - (1 - 0.8**rows) ** bands > 0.9
    assert 1 - (1 - 0.4**rows) ** bands < 0.02
