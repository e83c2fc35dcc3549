"""Rulers find what they are made to find, and nothing where there is nothing."""

import string

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.style_world import discrimination, preference
from trainer import rulers
from trainer.comparisons import compare, read_rows
from trainer.surface import OVERLAP_FEATURES, TEXT_FEATURES, pair_features, text_features


def item(reference: str, output: str) -> dict:
    return {"prompt": "q", "reference": reference, "output": output, "wrapper": "sft"}


def sides(groups):
    return (
        compare(read_rows(groups.filter(pc.field("split") == split))) for split in ("train", "eval")
    )


def accuracy(comparisons, score) -> float:
    return float(comparisons.outcomes(score(comparisons.items)).mean())


def test_length_prefers_the_closer_one_and_ties_on_equal_distance():
    scores = rulers.length([item("abcd", "abc"), item("abcd", "abcde"), item("abcd", "a")])
    assert scores[0] == scores[1] > scores[2]


def test_tfidf_is_cosine_and_rare_words_weigh_more():
    training = [item(f"the cat {i}", "the dog") for i in range(20)]
    score = rulers.fit_tfidf(training)
    same, rare, common, none = score(
        [item("the zebra", t) for t in ("The zebra!", "a zebra", "the b", "x y")]
    )
    assert same == pytest.approx(1)
    assert same > rare > common > none == 0


def test_random_is_a_function_of_the_texts_and_the_seed():
    items = [item("r", f"o{i}") for i in range(2000)]
    first = rulers.random(items)
    assert np.array_equal(first[::-1], rulers.random(items[::-1]))
    assert not np.array_equal(first, rulers.random(items, seed=1))
    assert 0.45 < first.mean() < 0.55


def test_surface_rulers_learn_a_style_that_they_can_see_and_carry_it_to_new_policies():
    training, held_out = sides(discrimination(600))
    fitted = rulers.fit_rulers(training)
    assert list(fitted) == list(rulers.RULERS)
    for name in ("tfidf", "surface_logistic", "surface_boosting"):
        assert accuracy(held_out, fitted[name]) > 0.75, name
    for name in ("length", "random", rulers.BLIND):
        assert 0.35 < accuracy(held_out, fitted[name]) < 0.65, name


def test_reference_blind_finds_a_corpus_that_gives_the_label_away():
    training, held_out = sides(discrimination(600, leak=True))
    score = rulers.fit_reference_blind(training)
    seen = held_out.cell == "new_prompt"
    assert held_out.outcomes(score(held_out.items))[seen].mean() > 0.8


def test_reference_blind_never_looks_at_the_reference():
    training, held_out = sides(discrimination(100))
    score = rulers.fit_reference_blind(training)
    swapped = [entry | {"reference": "something else"} for entry in held_out.items]
    np.testing.assert_array_equal(score(held_out.items), score(swapped))


def test_rulers_ignore_the_prompt_and_do_not_depend_on_the_order_of_items():
    training, held_out = sides(preference(60))
    for name, score in rulers.fit_rulers(training).items():
        scores = score(held_out.items)
        other = [entry | {"prompt": "another"} for entry in held_out.items[::-1]]
        np.testing.assert_allclose(scores, score(other)[::-1], atol=1e-9, err_msg=name)


def test_without_training_only_what_needs_none_is_there():
    assert list(rulers.fit_rulers(compare([]))) == ["length", "random"]


def test_one_comparison_and_texts_without_words_are_enough_to_fit():
    training, _ = sides(discrimination(20))
    one = training.only(np.arange(len(training)) == 0)
    for entry in one.items:
        entry["output"] = entry["reference"] = "…"
    for name, score in rulers.fit_rulers(one).items():
        assert np.isfinite(score([item("", ""), item("a b", "\n")])).all(), name


def test_bradley_terry_finds_the_weights_that_made_the_labels():
    rng = np.random.default_rng(0)
    features, true = rng.normal(size=(4000, 3)), np.array([1.5, -0.7, 0.0])
    left, right = np.arange(0, 4000, 2), np.arange(1, 4000, 2)
    wins = rng.random(2000) < 1 / (1 + np.exp(-(features[left] - features[right]) @ true))
    winner, loser = np.where(wins, left, right), np.where(wins, right, left)
    np.testing.assert_allclose(rulers.bradley_terry(features, winner, loser), true, atol=0.2)


def test_text_features_by_hand():
    values = dict(zip(TEXT_FEATURES, text_features(["One, two!\n\nTHREE é 4."])[0], strict=True))
    size = len("One, two!\n\nTHREE é 4.".encode())
    assert values["commas"] == pytest.approx(1 / size)
    assert values["line_breaks"] == pytest.approx(2 / size)
    assert values["capitals"] == pytest.approx(6 / size)
    assert values["digits"] == pytest.approx(1 / size)
    assert values["non_ascii"] == pytest.approx(2 / size)
    assert values["log_words"] == pytest.approx(np.log1p(5))
    assert values["starts_with_capital"] == values["ends_with_stop"] == 1
    assert values["ends_with_letter"] == 0


def test_overlap_features_by_hand():
    row = pair_features(["the cat sat"], ["The cat ran off"])[0]
    overlap = dict(zip(OVERLAP_FEATURES, row[len(TEXT_FEATURES) :], strict=True))
    assert overlap["shared_words"] == pytest.approx(2 / 5)
    assert overlap["reference_words_kept"] == pytest.approx(2 / 3)
    assert overlap["candidate_words_from_reference"] == pytest.approx(2 / 4)
    assert overlap["shared_word_pairs"] == pytest.approx(1 / 4)
    assert overlap["same_first_word"] == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_features_are_finite_for_any_text_and_do_not_depend_on_neighbours(texts):
    features = text_features(texts)
    assert features.shape == (len(texts), len(TEXT_FEATURES))
    assert np.isfinite(features).all()
    for text, row in zip(texts, features, strict=True):
        np.testing.assert_allclose(text_features([text])[0], row)
    pairs = pair_features(texts, texts[::-1])
    assert pairs.shape == (len(texts), len(TEXT_FEATURES) + len(OVERLAP_FEATURES))
    assert np.isfinite(pairs).all()


def test_a_text_beside_itself_differs_in_nothing():
    texts = ["A b, c.", string.printable, "é\n\n1"]
    rows = pair_features(texts, texts)
    assert not rows[:, : len(TEXT_FEATURES)].any()
    np.testing.assert_array_equal(rows[:, len(TEXT_FEATURES)], 1)
