"""Weights to start from: a decoder whose first heads already look where comparing needs them to.

From random weights a small decoder needs most of an hour to find out that the separator divides
two texts whose averages are worth a comparison. So that much is written down, and training goes on
from there:

- embeddings hold how a token is spelled and, from counts, what company it keeps;
- layer 0: the separator averages the reference; every later id learns that it comes after it;
- layer 1: the scored id fetches that average, and averages the candidate's ids beside it; each
  id of the candidate looks for its like in the reference, and at BOS if there is none;
- layer 1's MLP squares the differences of the two averages;
- layer 2: the scored id averages how many ids found nothing alike.

All other weights are random, and every one learns. No text of a held-out answer is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import svds
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from trainer.surface import TEXT_FEATURES, text_features
from trainer.template import REWARD, SEPARATOR

HEAD = 32
COMPANY = 30
SLOW = 15  # the pair of a head's dimensions that rotates least, with the one 16 further on
MATCH = range(6, 15)  # pairs that rotate little within a context
SCALE = 0.1
"""Size of embeddings' entries; states keep about it through the layers."""


def first_weights(
    tokenizer_path: Path,
    out: Path,
    texts: list[str],
    *,
    hidden: int,
    layers: int,
    intermediate: int,
    context: int,
    told: bool = True,
    seed: int = 0,
) -> Path:
    """Write a Llama with those weights to `out`; `told=False` leaves all of them random.

    Args:
        tokenizer_path: folder of the tokenizer.
        out: folder to write.
        texts: of training answers, for the company that tokens keep.
        hidden: width, a multiple of 32, at least 160.
        layers: at least three.
        intermediate: width of the MLPs.
        context: longest sequence.
        told: whether to write anything down.
        seed: of the random weights.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // HEAD,
            num_key_value_heads=hidden // HEAD,
            intermediate_size=intermediate,
            max_position_embeddings=context,
            rope_parameters={"rope_type": "default", "rope_theta": 1e8},
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if told:
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        spelled = token_features(tokenizer)
        near = company(rows, len(tokenizer), COMPANY)
        with torch.no_grad():
            _write(model, tokenizer, np.clip(np.column_stack([spelled, near]), -3, 3))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _write(model: Any, tokenizer: Any, known: np.ndarray) -> None:
    """Put what is known into embeddings and heads; see the top of this room."""
    size = known.shape[1]  # dimensions that hold a token, and the candidate's average
    average = size - 9  # of them are averaged (BOS's share, which is a length, is one more)
    fetched = size
    squares = fetched + average + 1
    bos, separator, reward, always, after, novel, novelty = range(
        squares + average + 1, squares + average + 8
    )
    if novelty >= model.config.hidden_size:
        msg = f"width {model.config.hidden_size} is too small, {novelty + 1} are needed"
        raise ValueError(msg)
    table = model.model.embed_tokens.weight
    table.zero_()
    table[:, :size] = torch.from_numpy(known).float() * SCALE
    table[:, always] = SCALE
    for token, flag in (
        (tokenizer.bos_token_id, bos),
        (tokenizer.convert_tokens_to_ids(SEPARATOR), separator),
        (tokenizer.convert_tokens_to_ids(REWARD), reward),
    ):
        table[token] = 0
        table[token, flag] = SCALE * size**0.5
        table[token, always] = SCALE
    table.add_(torch.randn_like(table) * 0.002)
    reads = [*range(average)]
    first, second, third = (layer for layer in model.model.layers[:3])

    halves = reads[: HEAD - 1], reads[HEAD - 1 :]
    for head, part in enumerate(halves):  # the separator averages, all others look at BOS
        _look(first, head, {always: 2.0, separator: -0.27}, {bos: 1.0})
        _carry(first, head, part, [fetched + i for i in part], 0.15)
    _look(first, 2, {always: 2.0}, {separator: 1.0})  # who finds a separator comes after it
    _carry(first, 2, [separator], [after], 0.05)
    _look(first, 3, {}, {})  # BOS's share of all ids before is one over their number
    _carry(first, 3, [bos], [fetched + average], 0.1)

    for head, part in enumerate(halves):  # the scored id fetches the reference's average
        _look(second, head, {reward: 1.0}, {separator: 1.0})
        moved = [fetched + i for i in part] + [fetched + average] * head
        _carry(second, head, moved, moved, 0.14)
    for head, part in enumerate(halves, start=2):  # and averages the candidate
        _look(second, head, {reward: 0.8}, {after: 0.5})
        last = head == 3
        _carry(second, head, [*part] + [reward] * last, [*part] + [average] * last, 0.35)
    _alike(second, 4, size, bos, always, after)
    _carry(second, 4, [bos], [novel], 0.1)

    mlp = second.mlp
    for i in range(average + 1):
        for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
            matrix[i] = 0
            matrix[i, i], matrix[i, fetched + i] = 1.0, -1.0
        mlp.down_proj.weight[:, i] = 0
        mlp.down_proj.weight[squares + i, i] = 0.05

    _look(third, 0, {reward: 0.8}, {after: 0.5})
    _carry(third, 0, [novel], [novelty], 1.0)


def _look(layer: Any, head: int, query: dict[int, float], key: dict[int, float]) -> None:
    """Ids with the flags of `query` look at ids with the flags of `key`; others at all alike."""
    for matrix, flags in (
        (layer.self_attn.q_proj.weight, query),
        (layer.self_attn.k_proj.weight, key),
    ):
        rows = matrix[head * HEAD : (head + 1) * HEAD]
        rows.mul_(0.3)
        rows[SLOW] = 0
        for flag, weight in flags.items():
            rows[SLOW, flag] = weight * 1.5


def _carry(layer: Any, head: int, read: list[int], write: list[int], weight: float) -> None:
    """What a head reads of the ids that it looks at, and where that goes."""
    values = layer.self_attn.v_proj.weight[head * HEAD : (head + 1) * HEAD]
    output = layer.self_attn.o_proj.weight[:, head * HEAD : (head + 1) * HEAD]
    values.mul_(0.3)
    output.mul_(0.3)
    for i, (source, target) in enumerate(zip(read, write, strict=True)):
        values[i] = 0
        values[i, source] = 1.0
        output[:, i] = 0
        output[target, i] = weight


def _alike(layer: Any, head: int, size: int, bos: int, always: int, after: int) -> None:
    """Ids look at ids before the separator that are like them, else at BOS."""
    places = [*MATCH, *(i + HEAD // 2 for i in MATCH)]
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(size, len(places), generator=generator)).Q.T
    for matrix in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
        rows = matrix[head * HEAD : (head + 1) * HEAD]
        rows.mul_(0.3)
        rows[places, :] = 0
        rows[places, :size] = directions * 1.6
        rows[SLOW] = 0
        rows[SLOW + HEAD // 2] = 0
    query = layer.self_attn.q_proj.weight[head * HEAD : (head + 1) * HEAD]
    key = layer.self_attn.k_proj.weight[head * HEAD : (head + 1) * HEAD]
    query[SLOW, always] = 3.0
    key[SLOW, after] = -3.0
    key[SLOW, bos] = 1.5


def token_features(tokenizer: Any) -> np.ndarray:
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
    flat = np.concatenate([np.r_[row, np.full(window, -1)] for row in rows]).astype(np.int64)
    for gap in range(1, window + 1):
        left, right = flat[:-gap], flat[gap:]
        real = (left >= 0) & (right >= 0)
        weight = np.full(int(real.sum()), 1.0 / gap)
        counts += sparse.csr_matrix((weight, (left[real], right[real])), shape=(size, size))
    pairs = (counts + counts.T).tocoo()
    own = np.asarray(pairs.sum(axis=0)).reshape(-1)
    expected = np.maximum(own, 1)[pairs.row] * np.maximum(own, 1)[pairs.col] ** 0.75
    ratio = np.log(pairs.data * (np.maximum(own, 1) ** 0.75).sum() / expected)
    positive = sparse.csr_matrix((np.maximum(ratio, 0), (pairs.row, pairs.col)), pairs.shape)
    left, values, _ = svds(positive, k=dimensions, random_state=0)
    vectors = left * np.sqrt(values)
    return vectors / np.maximum(vectors.std(axis=0), 1e-9)
