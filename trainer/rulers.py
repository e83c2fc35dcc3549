"""Rulers: cheap scorers that a reward model has to beat, and one that must find nothing.

Each is a function from items (dicts with `reference` and `output`; the prompt is never looked at)
to scores, like a model's. Those that learn are fitted on training comparisons only. The shuffled
reference is no ruler of this room: it is the model itself, asked with references of other groups
(`comparisons.shuffle_references`).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.comparisons import Comparisons, Item
from trainer.surface import WORD, pair_features, text_features

if TYPE_CHECKING:
    from scipy import sparse
    from sklearn.pipeline import Pipeline

Score = Callable[[list[Item]], np.ndarray]

SHUFFLED = "shuffled_reference"
BLIND = "reference_blind"
DESCRIPTIONS = {
    "length": "the candidate whose length in characters is closer to the reference's wins; "
    "nothing is learned",
    "tfidf": "cosine of reference and candidate as TF-IDF vectors of words, with document "
    "frequencies of the training texts",
    "surface_logistic": "logistic regression on how far a candidate is from its reference in two "
    "dozen surface features (length, punctuation, casing, digits, line breaks, vocabulary, "
    "endings) and on lexical overlap; fitted on training comparisons",
    "surface_boosting": "gradient-boosted trees on the same features; fitted on training "
    "candidates, winners against losers",
    BLIND: "logistic regression on the words and surface of the candidate alone, fitted on "
    "training comparisons; on policy discrimination it must stay at 0.50, or candidates give the "
    "label away without a look at the reference",
    "random": "a random number for every candidate",
    SHUFFLED: "the model itself, but with the reference of another group: of the same prompt and "
    "another policy where there is one, else of another prompt",
}
LEARNED = ("tfidf", "surface_logistic", "surface_boosting", BLIND)  # need training comparisons
RULERS = ("length", *LEARNED, "random")


def fit_rulers(training: Comparisons, names: Sequence[str] = RULERS, seed: int = 0) -> dict:
    """Fit the named rulers on `training`; those that learn are left out when it is empty.

    Returns:
        Name to scorer, in the order of `names`.
    """
    rulers: dict[str, Score] = {}
    features = None
    for name in names:
        if name in LEARNED and not len(training):
            continue
        if name.startswith("surface_") and features is None:
            features = _pair_features(training.items)
        if name == "length":
            rulers[name] = length
        elif name == "random":
            rulers[name] = functools.partial(random, seed=seed)
        elif name == "tfidf":
            rulers[name] = fit_tfidf(training.items)
        elif name == "surface_logistic":
            rulers[name] = fit_surface_logistic(training, features)
        elif name == "surface_boosting":
            rulers[name] = fit_surface_boosting(training, features, seed)
        elif name == BLIND:
            rulers[name] = fit_reference_blind(training)
    return rulers


def length(items: list[Item]) -> np.ndarray:
    """Minus the distance in characters between candidate and reference (n,)."""
    return np.array([-abs(len(item["reference"]) - len(item["output"])) for item in items], float)


def random(items: list[Item], seed: int = 0) -> np.ndarray:
    """A number in 0..1 drawn from a hash of reference and candidate (n,)."""
    keys = (f"{seed}\0{item['reference']}\0{item['output']}" for item in items)
    return np.array([zlib.crc32(key.encode("utf-8", "replace")) for key in keys]) / 2**32


def fit_tfidf(items: list[Item]) -> Score:
    """Cosine similarity to the reference over TF-IDF vectors of lower-cased words."""
    texts = sorted({item["output"] for item in items} | {item["reference"] for item in items})
    vectorizer = _word_vectors((1, 1)).fit(texts)

    def score(items: list[Item]) -> np.ndarray:
        references, outputs = _columns(items)
        products = vectorizer.transform(references).multiply(vectorizer.transform(outputs))
        return np.asarray(products.sum(axis=1)).reshape(-1)

    return score


def fit_surface_logistic(training: Comparisons, features: np.ndarray | None = None) -> Score:
    """Bradley-Terry on surface differences: linear, so fitted on differences of features."""
    from sklearn.preprocessing import StandardScaler

    features = _pair_features(training.items) if features is None else features
    scaler = StandardScaler().fit(features)
    weights = bradley_terry(scaler.transform(features), training.winner, training.loser)
    return lambda items: scaler.transform(_pair_features(items)) @ weights


def fit_surface_boosting(
    training: Comparisons, features: np.ndarray | None = None, seed: int = 0
) -> Score:
    """Gradient boosting on surface differences: each candidate a winner or a loser."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    features = _pair_features(training.items) if features is None else features
    rows = np.concatenate([training.winner, training.loser])
    labels = np.repeat([1, 0], len(training))
    model = HistGradientBoostingClassifier(max_iter=150, learning_rate=0.08, random_state=seed)
    model.fit(features[rows], labels)
    return lambda items: model.decision_function(_pair_features(items))


def fit_reference_blind(training: Comparisons) -> Score:
    """Bradley-Terry on words, word pairs and surface of the candidate; the reference is unseen."""
    from sklearn.preprocessing import StandardScaler

    outputs = [item["output"] for item in training.items]
    vectorizer = _word_vectors((1, 2))
    scaler = StandardScaler()
    words, surface = vectorizer.fit_transform(outputs), scaler.fit_transform(text_features(outputs))
    weights = bradley_terry(_joined(words, surface), training.winner, training.loser)

    def score(items: list[Item]) -> np.ndarray:
        texts = [item["output"] for item in items]
        surface = scaler.transform(text_features(texts))
        return _joined(vectorizer.transform(texts), surface) @ weights

    return score


def bradley_terry(features: Any, winner: np.ndarray, loser: np.ndarray) -> np.ndarray:
    """Weights w (F,) that make sigmoid((f_winner - f_loser) @ w) likely, with an L2 penalty.

    Flipping the sign of a comparison and its label leaves the likelihood as it is, so every second
    one is flipped to give the regression two classes.
    """
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression

    sign = np.where(np.arange(len(winner)) % 2, -1.0, 1.0)
    difference = features[winner] - features[loser]
    if sparse.issparse(difference):
        difference = sparse.diags_array(sign) @ difference
    else:
        difference = difference * sign[:, None]
    if len(winner) < 2:  # one comparison shows one direction
        return np.asarray(difference.sum(axis=0)).reshape(-1)
    model = LogisticRegression(fit_intercept=False, max_iter=300)
    return model.fit(difference, sign > 0).coef_[0]


def _columns(items: list[Item]) -> tuple[list[str], list[str]]:
    return [item["reference"] for item in items], [item["output"] for item in items]


def _pair_features(items: list[Item]) -> np.ndarray:
    return pair_features(*_columns(items))


def _word_vectors(ngrams: tuple[int, int]) -> Pipeline:
    """Hashed TF-IDF vectors of lower-cased word n-grams; a word never seen in fitting is rare."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.pipeline import make_pipeline

    hashing = HashingVectorizer(
        token_pattern=WORD, ngram_range=ngrams, n_features=2**18, norm=None, alternate_sign=False
    )
    return make_pipeline(hashing, TfidfTransformer(sublinear_tf=True))


def _joined(words: sparse.csr_matrix, surface: np.ndarray) -> sparse.csr_matrix:
    """Word and surface features side by side, scaled so that both have about unit length."""
    from scipy import sparse

    return sparse.hstack([words, sparse.csr_matrix(surface / np.sqrt(surface.shape[1]))]).tocsr()
