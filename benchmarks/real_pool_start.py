"""Weights to start from: a decoder that already averages two texts and compares the averages.

What tells policies apart is for the most part which tokens they use how often, and that is quickly
found without a decoder: `authors` trains vectors of tokens whose average over an answer says which
policy wrote it (seconds). In those averages two answers of one policy are alike, and of a policy
never seen as well. From random weights a decoder would need most of an hour to come to average the
right ids and to compare; so that much is written down, and training goes on from there:

- embeddings hold those vectors and how a token is spelled;
- layer 0: every id after the separator learns that it is;
- layer 1: the separator averages the ids before it, the scored id those of the candidate, in
  directions in which answers of one policy vary alike; every id of the candidate looks for its like
  in the reference, and at BOS if there is none;
- layer 2: the scored id fetches the reference's average, and averages how many ids found nothing
  alike; its MLP squares differences and sums of the two averages, which is what the likelihood
  ratio of one policy against two is made of.

All other weights are random, and every one learns. No text of a held-out answer is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from trainer.surface import TEXT_FEATURES, text_features
from trainer.template import REWARD, SEPARATOR

HEAD = 32
AUTHORS = 40  # dimensions of a token that are learned
KEPT = 48  # directions of the averages that are compared, in two heads
SLOW = 15  # the pair of a head's dimensions that rotates least, with the one 16 further on
MATCH = range(6, 15)  # pairs that rotate little within a context
SCALE = 0.1
"""Size of embeddings' entries."""
QUIET = 0.01
"""What random weights that write into the state are multiplied by."""
AVERAGE = 0.03
"""Size of the averages' entries, so small that the state's norm hardly depends on them."""


def first_weights(
    tokenizer_path: Path,
    out: Path,
    texts: list[str],
    policies: np.ndarray,
    *,
    hidden: int,
    layers: int,
    intermediate: int,
    context: int,
    longest: int,
    seed: int = 0,
) -> Path:
    """Write a Llama with those weights to `out`.

    Args:
        tokenizer_path: folder of the tokenizer.
        out: folder to write.
        texts: training answers.
        policies: (n,) whose they are, as numbers from 0.
        hidden: width, a multiple of 32, at least 288.
        layers: at least three.
        intermediate: width of the MLPs, at least `4 * KEPT`.
        context: longest sequence.
        longest: ids of an answer that are looked at.
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
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    known = np.clip(token_features(tokenizer), -3, 3)
    found = authors([row[:longest] for row in encoded], policies, known, seed=seed)
    with torch.no_grad():
        _write(model, tokenizer, found)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@dataclass(frozen=True)
class Authors:
    """Vectors of tokens whose averages tell policies apart, and the directions that do so best.

    `tokens` (V, T + 1) have a mean square of 1 and a last entry that is the same in all before
    that. `directions` (K, T + 1) of averages have mean 0, the last entry seeing to that, and
    variance 1 within policies. `spread` is the mean square of all of them.
    """

    tokens: Tensor
    directions: Tensor
    spread: float


def authors(
    rows: list[list[int]], policies: np.ndarray, known: np.ndarray, *, epochs: int = 3, seed: int
) -> Authors:
    """Train token vectors so that their average over an answer tells its policy.

    Args:
        rows: ids of answers.
        policies: (n,) whose they are.
        known: (V, F) what each vector starts with, which stays.
        epochs: times that every answer is seen.
        seed: of first vectors and order.
    """
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.from_numpy(known).float()
    learned = nn.Parameter(0.3 * torch.randn(len(known), AUTHORS, generator=generator))
    labels = torch.from_numpy(policies).long()
    probe = nn.Linear(fixed.shape[1] + AUTHORS, int(labels.max()) + 1)
    optimiser = torch.optim.AdamW(
        [{"params": [learned], "lr": 3e-2}, {"params": probe.parameters(), "lr": 1e-2}],
        weight_decay=0,
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5)
    flat = torch.from_numpy(np.concatenate(rows)).long()
    ends = np.cumsum([len(row) for row in rows])
    starts = torch.from_numpy(np.r_[0, ends[:-1]])
    sizes = torch.from_numpy(np.diff(np.r_[0, ends]))

    def tokens() -> Tensor:
        every = torch.cat([fixed, learned, torch.ones(len(fixed), 1)], dim=1)
        return every / every.square().mean(1, keepdim=True).sqrt()

    def averages(some: Tensor, vectors: Tensor) -> Tensor:
        ids = torch.cat([flat[starts[i] : starts[i] + sizes[i]] for i in some.tolist()])
        offsets = functional.pad(sizes[some].cumsum(0)[:-1], (1, 0))
        return functional.embedding_bag(ids, vectors, offsets, mode="mean")

    full = torch.nonzero(sizes > 0).squeeze(1)
    for _ in range(epochs):
        for some in full[torch.randperm(len(full), generator=generator)].split(256):
            told = probe(averages(some, tokens())[:, :-1])
            functional.cross_entropy(told, labels[some]).backward()
            optimiser.step()
            optimiser.zero_grad()
        schedule.step()
    with torch.no_grad():
        vectors = tokens()
        found = torch.cat([averages(some, vectors) for some in full.split(4096)])
        directions, spread = _directions(found, labels[full])
    return Authors(vectors, directions, spread)


def _directions(averages: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """The `KEPT` directions with most variance between policies for what they have within.

    Source: linear discriminant analysis (Rao, 1948), with a little added to the diagonal.
    """
    x = averages[:, :-1]
    counts = torch.bincount(labels).clamp(min=1)[:, None]
    middles = torch.zeros(len(counts), x.shape[1]).index_add_(0, labels, x) / counts
    inside = x - middles[labels]
    within = inside.T @ inside / len(x)
    within += 1e-3 * within.diagonal().mean() * torch.eye(len(within))
    sizes, axes = torch.linalg.eigh(within)
    whiten = axes * sizes.rsqrt()
    between = torch.cov(middles[torch.bincount(labels) > 0].T)
    _, turned = torch.linalg.eigh(whiten.T @ between @ whiten)
    best = (whiten @ turned[:, -KEPT:]).T
    z = (x - x.mean(0)) @ best.T
    last = -(best @ x.mean(0)) / averages[:, -1].mean()
    return torch.cat([best, last[:, None]], dim=1), float(z.square().mean())


def _write(model: Any, tokenizer: Any, found: Authors) -> None:
    """Put tokens into embeddings, looking and comparing into heads; see the top of this room."""
    hidden = model.config.hidden_size
    size = found.tokens.shape[1] - 1
    own, fetched, squares = (range(at, at + KEPT) for at in (size, size + KEPT, size + 2 * KEPT))
    end = squares.start + 2 * KEPT
    always, bos, separator, reward, after, share, novel, novelty = range(end, end + 8)
    if novelty >= hidden or model.config.intermediate_size < 4 * KEPT:
        msg = f"hidden must be {novelty + 1} or more, intermediate {4 * KEPT} or more"
        raise ValueError(msg)
    norm = SCALE * (size + 1) ** 0.5  # of every embedding
    table = model.model.embed_tokens.weight
    table.zero_()
    table[:, [*range(size), always]] = SCALE * found.tokens
    for token, flag in (
        (tokenizer.bos_token_id, bos),
        (tokenizer.convert_tokens_to_ids(SEPARATOR), separator),
        (tokenizer.convert_tokens_to_ids(REWARD), reward),
    ):
        table[token] = 0
        table[token, flag] = norm
    unit = hidden**0.5 / norm  # what a layer's norm makes of an embedding's entry
    for layer in model.model.layers:  # what is random stays below what is written down
        layer.self_attn.o_proj.weight.mul_(QUIET)
        layer.mlp.down_proj.weight.mul_(QUIET)
    first, second, third = (layer for layer in model.model.layers[:3])

    _look(first, 0, {always: 2.0}, {separator: 1.0})  # who finds a separator comes after it
    _carry(first, 0, torch.eye(hidden)[[separator]], [after], 0.2 / (norm * unit))
    read = torch.zeros(KEPT, hidden)
    read[:, [*range(size), always]] = found.directions / (SCALE * unit)
    halves = range(KEPT // 2), range(KEPT // 2, KEPT)
    for head, part in enumerate(halves):
        _look(second, head, {separator: 0.5, reward: 0.8}, {after: 1.0, bos: -0.5})
        _carry(second, head, read[list(part)], [own[i] for i in part], AVERAGE)
    _look(second, 2, {}, {})  # BOS's share of all ids before is one over their number
    _carry(second, 2, torch.eye(hidden)[[bos]], [share], 0.1)
    _alike(second, 3, size, bos, always, after)
    _carry(second, 3, torch.eye(hidden)[[bos]], [novel], 0.02)

    state = (norm**2 + KEPT * AVERAGE**2 * found.spread) ** 0.5  # of the separator by now
    for head, part in enumerate(halves):  # the scored id fetches the reference's average
        _look(third, head, {reward: 1.0}, {separator: 1.0})
        moved = torch.eye(hidden)[[own[i] for i in part]]
        _carry(third, head, moved, [fetched[i] for i in part], state / hidden**0.5)
    _look(third, 2, {reward: 0.8}, {after: 1.0})
    _carry(third, 2, torch.eye(hidden)[[novel]], [novelty], 1.0)

    mlp, row = third.mlp, 0
    for sign in (-1.0, 1.0):  # differences, sums; of each both ways, for silu(x) x is half a square
        for i in range(KEPT):
            target = squares.start + i + (KEPT if sign > 0 else 0)
            for way in (-1.0, 1.0):
                for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
                    matrix[row] = 0
                    matrix[row, own[i]], matrix[row, fetched[i]] = way, sign * way
                mlp.down_proj.weight[:, row] = 0
                mlp.down_proj.weight[target, row] = 0.05
                row += 1


def _look(layer: Any, head: int, query: dict[int, float], key: dict[int, float]) -> None:
    """Ids with the flags of `query` look at ids with the flags of `key`; others at all alike."""
    for matrix, flags in (
        (layer.self_attn.q_proj.weight, query),
        (layer.self_attn.k_proj.weight, key),
    ):
        rows = matrix[head * HEAD : (head + 1) * HEAD]
        rows.mul_(0.1)
        rows[SLOW] = 0
        for flag, weight in flags.items():
            rows[SLOW, flag] = weight * 1.5


def _carry(layer: Any, head: int, read: Tensor, write: list[int], weight: float) -> None:
    """What a head reads of the ids that it looks at, (n, E), and where that goes."""
    values = layer.self_attn.v_proj.weight[head * HEAD : (head + 1) * HEAD]
    output = layer.self_attn.o_proj.weight[:, head * HEAD : (head + 1) * HEAD]
    values.mul_(0.3)
    values[: len(read)] = read
    output[:, : len(read)] = 0
    output[write, range(len(read))] = weight


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
