"""The recipe of `bench-real-pool`: what is measured of answers, and weights to start from.

Nothing here sees a held-out answer: the caller hands in rows of the training cell.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import svds
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.preprocessing import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.real_pool_task import Pool
from trainer.guided import Guide
from trainer.surface import TEXT_FEATURES, text_features

EDGE = 60
"""Characters of an answer's beginning and end that are compared on their own."""


class Measures:
    """What can be measured of answers of a pool and of two of them, computed once a text."""

    def __init__(self, pool: Pool, fit: np.ndarray) -> None:
        """`fit`: rows that document frequencies are counted over."""
        texts = pool.text
        self.own = text_features(list(texts))
        self.lengths = np.array([len(text) for text in texts], float)
        words = _vectors("word", (1, 2)).transform(texts)
        self.sets = _vectors("word", (1, 1)).transform(texts)
        self.sets.data[:] = 1
        self.spaces = [
            _tfidf(words, fit),
            normalize(_vectors("char", (1, 3)).transform([text[:EDGE] for text in texts])),
            normalize(_vectors("char", (1, 3)).transform([text[-EDGE:] for text in texts])),
        ]

    def pairs(self, reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        """Numbers about every reference and candidate, (n, F)."""
        left, right = self.own[reference], self.own[candidate]
        shared = _products(self.sets, reference, candidate)
        size = np.asarray(self.sets.sum(axis=1)).reshape(-1)
        a, b = size[reference], size[candidate]
        logs = np.log1p(self.lengths[reference]) - np.log1p(self.lengths[candidate])
        return np.column_stack(
            [
                np.abs(left - right),
                left,
                right,
                *(np.sqrt(_products(space, reference, candidate)) for space in self.spaces),
                shared / np.maximum(a + b - shared, 1),
                shared / np.maximum(a, 1),
                shared / np.maximum(b, 1),
                logs,
                np.abs(logs),
            ]
        )


def _vectors(analyzer: str, ngrams: tuple[int, int]) -> HashingVectorizer:
    return HashingVectorizer(
        analyzer=analyzer,
        token_pattern=r"\w+|[^\w\s]",
        ngram_range=ngrams,
        n_features=2**16,
        norm=None,
        alternate_sign=False,
        lowercase=analyzer == "word",
    )


def _tfidf(counts: sparse.csr_matrix, fit: np.ndarray) -> sparse.csr_matrix:
    return TfidfTransformer(sublinear_tf=True).fit(counts[fit]).transform(counts)


def _products(rows: sparse.csr_matrix, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    found = np.empty(len(left))
    for start in range(0, len(left), 20_000):
        part = slice(start, start + 20_000)
        found[part] = np.asarray(rows[left[part]].multiply(rows[right[part]]).sum(1)).reshape(-1)
    return found


def guide_of(
    pool: Pool, measures: Measures, drawn: list[list[int]], extra: np.ndarray | None = None
) -> Guide:
    """The guide of drawn groups: standardised numbers, the two policies, the two groups."""
    reference = np.repeat([answers[0] for answers in drawn], [len(a) - 1 for a in drawn])
    candidate = np.concatenate([answers[1:] for answers in drawn])
    numbers = measures.pairs(reference, candidate)
    if extra is not None:
        numbers = np.column_stack([numbers, extra])
    numbers -= numbers.mean(axis=0)
    numbers /= np.maximum(numbers.std(axis=0), 1e-6)
    names, codes = np.unique(pool.policy.astype(str), return_inverse=True)
    classes = np.stack([codes[reference], codes[candidate]], axis=1)
    return Guide(
        numbers=np.clip(numbers, -4, 4).astype(np.float32),
        classes=classes,
        sizes=(len(names), len(names)),
    )


def token_features(tokenizer) -> np.ndarray:
    """What the spelling of each token of a vocabulary says, (V, F), standardised."""
    spelled = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    stripped = [text.strip() for text in spelled]
    lengths = np.array([[len(t), len(t.split()), t.startswith(" ")] for t in spelled], float)
    ends = np.array([[s[:1].isupper(), s.isupper() and len(s) > 1] for s in stripped], float)
    features = np.column_stack([text_features(spelled)[:, 6 : len(TEXT_FEATURES)], lengths, ends])
    features -= features.mean(axis=0)
    return features / np.maximum(features.std(axis=0), 1e-6)


def company(rows: list[list[int]], size: int, dimensions: int, window: int = 4) -> np.ndarray:
    """Vectors of ids by the ids that stand near them, (size, dimensions).

    Source: positive pointwise mutual information and its singular vectors (Levy and Goldberg,
    "Neural word embedding as implicit matrix factorization", NeurIPS 2014).
    """
    counts = sparse.csr_matrix((size, size), dtype=np.float64)
    flat = np.concatenate([np.r_[row, np.full(window, -1)] for row in rows])
    for gap in range(1, window + 1):
        left, right = flat[:-gap], flat[gap:]
        real = (left >= 0) & (right >= 0)
        weight = np.full(real.sum(), 1.0 / gap)
        counts += sparse.csr_matrix((weight, (left[real], right[real])), shape=(size, size))
    counts = (counts + counts.T).tocoo()
    total, own = counts.sum(), np.asarray(counts.sum(axis=0)).reshape(-1)
    smooth = own**0.75
    pmi = np.log(
        counts.data * smooth.sum() / (np.maximum(own[counts.row], 1) * smooth[counts.col] + 1e-9)
    )
    del total
    positive = sparse.csr_matrix((np.maximum(pmi, 0), (counts.row, counts.col)), counts.shape)
    left, values, _ = svds(positive, k=dimensions, random_state=0)
    vectors = left * np.sqrt(values)
    return vectors / np.maximum(vectors.std(axis=0), 1e-9)


def first_weights(
    tokenizer_path: Path,
    out: Path,
    texts: list[str],
    *,
    hidden: int,
    layers: int,
    heads: int,
    intermediate: int,
    context: int,
    init: float = 0.02,
    told: bool = True,
    seed: int = 0,
) -> Path:
    """A decoder whose embeddings know how tokens are spelled and what company they keep."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=intermediate,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            initializer_range=init,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if told:
        spelled = token_features(tokenizer)
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        near = company(rows, len(tokenizer), hidden - spelled.shape[1])
        table = torch.from_numpy(np.column_stack([spelled, near])).float()
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(table.clamp(-4, 4) * init)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out
