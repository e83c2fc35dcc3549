"""Signatures equal datasketch's to the bit, and estimate as the theory says."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import minhash
from pipelines.minhash import (
    MinHashSettings,
    Shingles,
    distinct,
    jaccard,
    matrix,
    shingles,
    signatures,
    signatures_schema,
)
from pipelines.quality import UNSPACED, flags

# Written with `reference` below and datasketch 2.0.0: text -> little-endian signature in hex.
GOLDEN = Path(__file__).parent / "golden/minhash.json"
SPACES = " \t\n\u00a0\u2003\u3000"
HIDDEN = "\u200b\u200d\ufeff\u00ad\x00\u2800"

texts = st.text(
    st.sampled_from("abcABCäÖß🙂.,好のกཀက\U00020000" + SPACES * 2 + HIDDEN), max_size=60
)


def reference_shingles(text, words=5):
    """The documented recipe in plain Python, the reference implementation of xxh32 included."""
    apart = re.sub(f"([{UNSPACED}])", r" \1 ", text)
    shown = ["".join(c for c in word.lower() if c not in HIDDEN) for word in apart.split()]
    hashes = [xxhash.xxh32_intdigest(word.encode()) for word in shown if word]
    if not hashes:
        return []
    starts = range(max(1, len(hashes) - words + 1))
    return [b"".join(h.to_bytes(4, "little") for h in hashes[i : i + words]) for i in starts]


def reference(text, permutations=128, seed=1, words=5):
    minhash = MinHash(permutations, seed=seed, scheme="affine32", hashfunc=xxhash.xxh32_intdigest)
    minhash.update_batch(reference_shingles(text, words))
    return minhash


def hashes_of(sets, text):
    return sets.hashes[sets.offsets[text] : sets.offsets[text + 1]]


@pytest.fixture(params=["compiled", "numpy"], scope="module")
def form(request):
    """Both forms of the inner loops, which must give the same bits."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(minhash, "compiled", lambda: None)
        elif minhash.compiled() is None:
            pytest.skip("numba is not installed, or POLAR_COMPILED is 0")
        yield request.param


def test_golden_vectors(form):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    made = signatures(shingles(pa.array(list(golden))))
    assert made.dtype == np.uint32
    assert [row.astype("<u4").tobytes().hex() for row in made] == list(golden.values())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(texts, min_size=1, max_size=8),
    st.sampled_from([16, 112, 128]),
    st.integers(0, 5),
    st.integers(1, 9),
)
def test_bit_equal_to_datasketch(form, batch, permutations, seed, words):
    config = MinHashSettings(permutations=permutations, seed=seed, words=words)
    sets = shingles(pa.array(batch), words)
    for i, text in enumerate(batch):
        expected = [xxhash.xxh32_intdigest(s) for s in reference_shingles(text, words)]
        assert hashes_of(sets, i).tolist() == expected
    made = signatures(sets, config)
    for row, text in zip(made, batch, strict=True):
        assert row.tolist() == reference(text, permutations, seed, words).hashvalues.tolist()


@settings(max_examples=30, deadline=None)
@given(st.lists(texts, max_size=12), st.integers(0, 12), st.integers(0, 12))
def test_a_batch_is_its_parts(form, batch, start, length):
    whole = pa.array(batch, pa.string())
    part = whole.slice(start, length)
    expected = signatures(shingles(whole))[start : start + length]
    assert np.array_equal(signatures(shingles(part)), expected)


def test_short_texts_have_one_shingle_of_all_their_words():
    sets = shingles(pa.array(["", "one", "one two", "a b c d", "a b c d e", "a b c d e f"]))
    assert np.diff(sets.offsets).tolist() == [0, 1, 1, 1, 1, 2]
    assert len(set(sets.hashes.tolist())) == 6 - 1  # the fifth text is the sixth's beginning


def test_case_spacing_and_hidden_characters_do_not_count():
    sets = shingles(
        pa.array(["The Answer\n is  42.", "the answer is 42.", "\ufeffthe ans\u200bwer is 42."])
    )
    assert len(set(sets.hashes.tolist())) == 1


def test_texts_without_spaces_are_compared_by_characters(form):
    one = "为什么天空在白天看起来是蓝色的,而在日落的时候会变成红色,请举出两个例子来说明这个现象。"
    sets = shingles(pa.array([one, one.replace("两个", "三个")]))
    assert np.diff(sets.offsets).min() > 30
    assert 0.7 < jaccard(sets, np.array([0]), np.array([1]))[0] < 1


def test_without_words_is_what_quality_calls_empty(form):
    points = [*range(0xD800), *range(0xE000, 0x11000), *range(0xE0000, 0xE0200)]
    every = pa.array([chr(point) for point in points])
    empty = ["empty" in marks for marks in flags(every).to_pylist()]
    assert sum(empty) > 50
    assert (np.diff(shingles(every).offsets) == 0).tolist() == empty


def test_signature_of_an_empty_text_is_datasketchs_of_an_empty_set():
    made = signatures(shingles(pa.array([" \u200b", "x"])))
    assert MinHash(scheme="affine32", hashvalues=made[0]).is_empty()
    assert not MinHash(scheme="affine32", hashvalues=made[1]).is_empty()


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=2, max_size=6))
def test_exact_jaccard_equals_that_of_python_sets(form, batch):
    left, right = np.triu_indices(len(batch), 1)
    made = jaccard(shingles(pa.array(batch), 2), left, right)
    sets = [set(reference_shingles(text, 2)) for text in batch]
    for value, i, j in zip(made, left, right, strict=True):
        union = len(sets[i] | sets[j])
        assert value == (len(sets[i] & sets[j]) / union if union else 0)


def test_every_character_and_length_means_the_same_in_both_forms(monkeypatch):
    """Each code point inside a word and around one, and words of all lengths."""
    points = [*range(0xD800), *range(0xE000, 0x11000), *range(0x10000, 0x1FFFF, 3)]
    points += [*range(0x20000, 0x110000, 97), *range(0xE0000, 0xE1000)]
    every = [f"A{chr(point)}b {chr(point)}C c d e {chr(point)}" for point in points]
    every += ["x" * size + " y" * (size % 9) for size in range(70)]
    wide = pa.array(every, pa.large_string())
    made = shingles(wide)
    assert np.array_equal(shingles(wide.cast(pa.string())).hashes, made.hashes)
    monkeypatch.setattr(minhash, "compiled", lambda: None)
    expected = shingles(wide)
    assert np.array_equal(made.hashes, expected.hashes)
    assert np.array_equal(made.offsets, expected.offsets)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=6))
def test_distinct_keeps_each_hash_where_it_first_stands(form, lists):
    flat = np.array([value for values in lists for value in values], np.uint32)
    made = distinct(Shingles(flat, np.cumsum([0, *map(len, lists)])))
    kept = [made.hashes[a:b].tolist() for a, b in zip(made.offsets, made.offsets[1:], strict=False)]
    assert kept == [list(dict.fromkeys(values)) for values in lists]


def test_estimates_are_within_theory():
    """Mean error within 4 standard errors of 0, and its variance within a factor of two."""
    rng = np.random.default_rng(7)
    pairs, size, permutations = 400, 200, 128
    shared = np.tile([0.1, 0.3, 0.5, 0.8, 0.95], pairs // 5)
    both = []
    for share in shared:
        pool = rng.choice(2**32, 2 * size, replace=False).astype(np.uint32)
        moved = round(size * (1 - share))
        both += [pool[:size], np.concatenate([pool[moved:size], pool[size : size + moved]])]
    sets = Shingles(np.concatenate(both), np.arange(0, 2 * pairs + 1) * size)
    exact = jaccard(sets, np.arange(0, 2 * pairs, 2), np.arange(1, 2 * pairs, 2))
    made = signatures(sets)
    z = ((made[::2] == made[1::2]).mean(axis=1) - exact) / np.sqrt(
        exact * (1 - exact) / permutations
    )
    assert abs(z.mean()) < 4 / np.sqrt(pairs)
    assert 0.5 < z.var() < 2
    assert np.abs(z).max() < 5


def test_recipe_travels_with_the_file():
    config = MinHashSettings(permutations=112, words=3)
    schema = signatures_schema(config)
    assert MinHashSettings.of(schema) == config
    with pytest.raises(ValueError, match="not a signatures file of scheme affine32"):
        MinHashSettings.of(schema.remove_metadata())


def test_matrix_reads_a_signature_column_back():
    values = signatures(shingles(pa.array(["a b c", "d e f", "g"])))
    kind = signatures_schema(MinHashSettings()).field("signature").type
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)
    assert np.array_equal(matrix(column), values)
    assert np.array_equal(matrix(pa.chunked_array([column[:1], column[1:]])), values)
