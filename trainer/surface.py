"""What can be seen of a text without reading it: length, punctuation, casing, endings, overlap.

Made for the rulers, which must be quick: all counting is done at once over the UTF-8 bytes of all
texts. No model and no fitting here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

WORD = r"\w+"
_CLASSES = {  # ASCII bytes counted one by one; every one gives a column
    "letters": b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "capitals": b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "digits": b"0123456789",
    "spaces": b" \t",
    "line_breaks": b"\n",
    "full_stops": b".",
    "commas": b",",
    "question_marks": b"?",
    "exclamation_marks": b"!",
    "colons": b":;",
    "quotes": b"\"'`",
    "brackets": b"()[]{}<>",
    "dashes": b"-",
    "symbols": b"*#_=+/\\|~^%$&@",
}
TEXT_FEATURES = (
    "log_length",
    "log_words",
    "word_length",
    "word_variety",
    "sentence_words",
    "line_words",
    "blank_lines",
    "non_ascii",
    *_CLASSES,
    "starts_with_capital",
    "ends_with_stop",
    "ends_with_letter",
    "ends_with_digit",
)
OVERLAP_FEATURES = (
    "shared_words",
    "reference_words_kept",
    "candidate_words_from_reference",
    "shared_word_pairs",
    "same_first_word",
)
_SENTENCE_END = tuple(".!?。！？\"')]}")


def text_features(texts: Sequence[str]) -> np.ndarray:
    """The features of each text alone, (n, len(TEXT_FEATURES)): shares, means and logarithms."""
    if not texts:
        return np.empty((0, len(TEXT_FEATURES)))
    words = [re.findall(WORD, text.lower()) for text in texts]
    word_count = np.array([len(w) for w in words], float)
    letters_in_words = np.array([sum(map(len, w)) for w in words], float)
    distinct = np.array([len(set(w)) for w in words], float)
    length = np.array([len(text) for text in texts], float)
    counts, size = _byte_counts(texts)
    some = np.maximum(size, 1)
    column = dict(zip(_CLASSES, counts.T, strict=True))
    ends = column["full_stops"] + column["question_marks"] + column["exclamation_marks"]
    stripped = [text.strip() for text in texts]
    return np.column_stack(
        [
            np.log1p(length),
            np.log1p(word_count),
            letters_in_words / np.maximum(word_count, 1),
            distinct / np.maximum(word_count, 1),
            np.log1p(word_count / (ends + 1)),
            np.log1p(word_count / (column["line_breaks"] + 1)),
            np.log1p([text.count("\n\n") for text in texts]),
            (size - np.array([len(t.encode("ascii", "ignore")) for t in texts])) / some,
            *(values / some for values in column.values()),
            [text[:1].isupper() for text in stripped],
            [text.endswith(_SENTENCE_END) for text in stripped],
            [text[-1:].isalpha() for text in stripped],
            [text[-1:].isdigit() for text in stripped],
        ]
    )


def pair_features(references: Sequence[str], candidates: Sequence[str]) -> np.ndarray:
    """Differences of the text features, and lexical overlap: (n, text + overlap features).

    Differences are absolute: they say how far a candidate is from its reference, not which way.
    """
    texts, code = np.unique(np.array([*references, *candidates], object), return_inverse=True)
    left, right = code.reshape(2, -1)
    features = text_features(list(texts))
    first = np.array([(text.split(maxsplit=1) or [""])[0].lower() for text in texts], object)
    words, pairs = _bags(texts, 1), _bags(texts, 2)
    shared, left_size, right_size = _overlap(words, left, right)
    shared_pairs, left_pairs, right_pairs = _overlap(pairs, left, right)
    return np.column_stack(
        [
            np.abs(features[left] - features[right]),
            _ratio(shared, left_size + right_size - shared),
            _ratio(shared, left_size),
            _ratio(shared, right_size),
            _ratio(shared_pairs, left_pairs + right_pairs - shared_pairs),
            (first[left] == first[right]).astype(float),
        ]
    )


def _byte_counts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """How many bytes of each class each text has, (n, classes), and its size in bytes, (n,)."""
    encoded = [text.encode("utf-8", "replace") for text in texts]
    size = np.array([len(text) for text in encoded])
    data = np.frombuffer(b"".join(encoded), np.uint8)
    edges = np.concatenate([[0], np.cumsum(size)])
    counts = np.empty((len(texts), len(_CLASSES)))
    for index, members in enumerate(_CLASSES.values()):
        table = np.zeros(256, np.int32)
        table[list(members)] = 1
        running = np.concatenate([[0], np.cumsum(table[data], dtype=np.int32)])
        counts[:, index] = running[edges[1:]] - running[edges[:-1]]
    return counts, size


def _bags(texts: np.ndarray, n: int):
    """Sets of word n-grams as rows of a sparse 0/1 matrix."""
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(
        token_pattern=WORD,
        ngram_range=(n, n),
        n_features=2**20,
        binary=True,
        norm=None,
        alternate_sign=False,
    ).transform(texts)


def _overlap(bags, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, ...]:
    """Sizes of the intersections and of both sides, (n,) each."""
    size = np.asarray(bags.sum(axis=1)).reshape(-1)
    shared = np.asarray(bags[left].multiply(bags[right]).sum(axis=1)).reshape(-1)
    return shared, size[left], size[right]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part` of `whole`; 0 where both are empty."""
    return part / np.maximum(whole, 1)
