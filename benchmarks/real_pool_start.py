"""Weights to start from: a decoder that already averages two texts and compares the averages.

What tells policies apart is for the most part which tokens they use how often, how they begin, and
how long they go on. That is quickly found without a decoder: `real_pool_authors` trains vectors of
tokens whose averages over an answer and its first ids say which policy wrote it (seconds). In those
averages two answers of one policy are alike, and of a policy never seen as well. From random
weights a decoder would need most of an hour to come to average the right ids and to compare; so
that much is written down, and training goes on from there:

- embeddings hold those vectors, and which tokens are special or break a line;
- layer 0: every id learns whether it comes after the separator, and whether just after a break;
- layer 1: it learns how many lines its half has had: the prompt stands on the first, the answer
  begins on the second (in a prompt of several lines that is wrong, and costs little);
- layer 2: the scored id averages the answers on both sides, their first ids, and how long they
  are, in directions in which answers of one policy are alike; its MLP squares differences and sums
  of the two sides, and weighs them as in the likelihood ratio of one policy against two. The score
  is that ratio.

All other weights are random, and every one learns. No text of a held-out answer is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from benchmarks.real_pool_authors import KEPT, LENGTH, Authors, authors, token_features
from trainer.template import REWARD, SEPARATOR

HEAD = 32
BEGIN = 7  # ids that an answer begins with, the line break before it among them
SLOW = 15  # the pair of a head's dimensions that rotates least, with the one 16 further on
RECENT = {2: 32.0, 3: 48.0}  # pairs that rotate by 0.1 and 0.03 an id; logits at distance 0
OLD = 75.0  # logit of "not recent", passed at a distance of about 5
SURE = 12.0  # logit of an id that is looked at, above those that are not
CONSTANT, BREAK = 0.1, 0.4  # shares of a token's squares that are a constant, and a line break
SCALE = 0.1
"""Size of embeddings' entries."""
QUIET = 0.01
"""What random weights that write into the state are multiplied by."""
AVERAGE = 0.03
"""Size of the averages' entries, so small that the state's norm hardly depends on them."""
FLAG = 0.1
"""Size of what an id learns of its place."""
WEIGHT = 2.5
"""Of the likelihood ratio in the score."""


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
    """Write a Llama with those weights and its head to `out`.

    Args:
        tokenizer_path: folder of the tokenizer.
        out: folder to write.
        texts: training answers.
        policies: (n,) whose they are, as numbers from 0.
        hidden: width, a multiple of 32, at least 192.
        layers: at least three.
        intermediate: width of the MLPs, at least `4 * KEPT`.
        context: longest sequence.
        longest: ids of an answer that are looked at.
        seed: of the random weights.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            num_labels=1,
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
    known, breaks = token_features(tokenizer)
    (line,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    rows = [[line, *row[: longest - 1]] for row in encoded]
    sizes = (1 - CONSTANT - BREAK * breaks) ** 0.5  # a token's squares are for its flags as well
    found = authors(rows, policies, np.clip(known, -3, 3), sizes, early(), seed=seed)
    with torch.no_grad():
        _write(model, tokenizer, found, torch.from_numpy(breaks))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def early() -> Tensor:
    """How much the ids from a line break on weigh among those that an answer begins with.

    A head of layer 0 says how recent the break is, by `RECENT`; one of layer 2 looks accordingly.
    """
    distance = torch.arange(BEGIN)
    logits = [logit * torch.cos(10 ** (-pair / 2) * distance) for pair, logit in RECENT.items()]
    recent = torch.sigmoid(torch.stack(logits).sum(0) - OLD)
    return (SURE * (recent - 1)).exp()


def _write(model: Any, tokenizer: Any, found: Authors, breaks: Tensor) -> None:
    """Put tokens into embeddings, looking and comparing into heads; see the top of this room."""
    hidden, width = model.config.hidden_size, found.tokens.shape[1]
    own, fetched = (range(at, at + KEPT) for at in (width, width + KEPT))
    squares = range(fetched.stop, fetched.stop + 2 * KEPT)
    evidence, constant, bos, separator, reward, newline, after, early, lines, first, prompt = range(
        squares.stop, squares.stop + 11
    )
    if prompt >= hidden or model.config.intermediate_size < 4 * KEPT:
        msg = f"hidden must be {prompt + 1} or more, intermediate {4 * KEPT} or more"
        raise ValueError(msg)
    norm = SCALE * width**0.5  # of every embedding
    unit = hidden**0.5 / norm  # what a layer's norm makes of an entry
    table = model.model.embed_tokens.weight
    table.zero_()
    table[:, :width] = SCALE * found.tokens
    table[:, constant] = norm * CONSTANT**0.5
    table[:, newline] = norm * BREAK**0.5 * breaks
    for token, flag in (
        (tokenizer.bos_token_id, bos),
        (tokenizer.convert_tokens_to_ids(SEPARATOR), separator),
        (tokenizer.convert_tokens_to_ids(REWARD), reward),
    ):
        table[token] = 0
        table[token, flag] = norm
    for layer in model.model.layers:  # what is random stays below what is written down
        layer.self_attn.o_proj.weight.mul_(QUIET)
        layer.mlp.down_proj.weight.mul_(QUIET)
    zero, one, two = (layer for layer in model.model.layers[:3])
    entries = dict.fromkeys((bos, separator, reward), norm) | {
        constant: norm * CONSTANT**0.5,
        newline: norm * BREAK**0.5,
        **dict.fromkeys((after, early, lines, first, prompt), FLAG),
    }
    size = {flag: entry * unit for flag, entry in entries.items()}  # as a layer sees it

    def carry(layer: Any, head: int, flags: list[int], target: int) -> None:
        """The share of ids with one of the flags, as a flag of its own."""
        read = torch.zeros(1, hidden)
        for flag in flags:
            read[0, flag] = 1 / size[flag]
        _carry(layer, head, read, [target], FLAG)

    _look(zero, 0, (constant, size), {separator: SURE})
    carry(zero, 0, [separator], after)
    _look(zero, 1, (constant, size), {bos: OLD}, recent=newline)
    carry(zero, 1, [newline], early)
    # the first line of a half is the separator's or BOS's share of all its line breaks
    early_only, both = (
        1 / (1 + n * FLAG**2 / norm**2) ** 0.5 for n in (1, 2)
    )  # a norm's shrinking
    halves = {bos: SURE * early_only, separator: 2 * SURE * both}
    _look(one, 0, (constant, size), {newline: SURE, after: SURE, **halves})
    carry(one, 0, [bos, separator], lines)
    ramps = ((prompt, 1.0, 0.6, 0.9), (first, 1.0, 0.4, 0.48), (first, -1.0, 0.6, 0.9))
    for number, (target, sign, low, high) in enumerate(ramps):  # from 0 at low to sign at high
        slope = sign * FLAG / (high - low)
        _ramp(one, 2 * number, lines, constant, size, low, target, slope)
        _ramp(one, 2 * number + 1, lines, constant, size, high, target, -slope)

    scored = (reward, size)
    read = torch.zeros(KEPT, hidden)
    read[:, :width] = found.whole / (SCALE * unit)
    read[:, constant] = found.offset / size[constant]
    start = torch.zeros(KEPT, hidden)
    start[:, :width] = found.begin / (SCALE * unit)
    sink = torch.zeros(KEPT, hidden)
    sink[:, bos] = found.length / size[bos]
    far = SURE + float(np.log(LENGTH))
    for number, (side, target) in enumerate(((1.0, own), (-1.0, fetched))):
        answer = {after: side * SURE, prompt: -SURE, bos: -SURE, separator: -SURE}
        beginning = {after: side * SURE, first: SURE, early: SURE}
        _look(two, number, scored, answer)
        _carry(two, number, read, list(target), AVERAGE)
        _look(two, 2 + number, scored, beginning)
        _carry(two, 2 + number, start, list(target), AVERAGE)
        _look(two, 4 + number, scored, answer | {bos: far if side > 0 else far - SURE})
        _carry(two, 4 + number, sink, list(target), AVERAGE)

    # Under one policy differences have variance 2 and sums 2 + 4b, under two both have 2 + 2b.
    same, other = 1 / (1 + 2 * found.between), 1 / (1 + found.between)
    ratio = {-1.0: (other - 1).tolist(), 1.0: (other - same).tolist()}
    mlp, row = two.mlp, 0
    mlp.down_proj.weight[evidence] = 0
    for sign in (-1.0, 1.0):  # differences, sums; both ways, as silu(x) x + silu(-x) (-x) = x^2
        for i in range(KEPT):
            square = squares.start + i + (KEPT if sign > 0 else 0)
            for way in (-1.0, 1.0):
                for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
                    matrix[row] = 0
                    matrix[row, own[i]], matrix[row, fetched[i]] = way, sign * way
                mlp.down_proj.weight[:, row] = 0
                mlp.down_proj.weight[square, row] = 0.05
                mlp.down_proj.weight[evidence, row] = 0.05 * ratio[sign][i]
                row += 1
    model.score.weight.zero_()
    model.score.weight[0, evidence] = WEIGHT


def _look(
    layer: Any,
    head: int,
    query: tuple[int, dict[int, float]],
    keys: dict[int, float],
    recent: int | None = None,
) -> None:
    """Ids with the query's flag look at ids by their flags; all others at all ids alike.

    Args:
        layer: whose attention it is.
        head: its number.
        query: the flag, and what each flag's entry is where it is set.
        keys: what each flag adds to an id's logit.
        recent: a flag that adds `RECENT` to it, less with the distance.
    """
    flag, size = query
    rows = slice(head * HEAD, (head + 1) * HEAD)
    asks, keeps = layer.self_attn.q_proj.weight[rows], layer.self_attn.k_proj.weight[rows]
    for matrix in (asks, keeps):
        matrix.mul_(0.1)
        for pair in (SLOW, *RECENT):
            matrix[[pair, pair + HEAD // 2]] = 0
    asks[SLOW, flag] = HEAD**0.5 / size[flag]
    for key, logit in keys.items():
        keeps[SLOW, key] = logit / size[key]
    if recent is not None:
        for pair, logit in RECENT.items():
            asks[pair, flag] = HEAD**0.5 / size[flag]
            keeps[pair, recent] = logit / size[recent]


def _carry(layer: Any, head: int, read: Tensor, write: list[int], weight: float) -> None:
    """What a head reads of the ids that it looks at, (n, E), and where that goes."""
    values = layer.self_attn.v_proj.weight[head * HEAD : (head + 1) * HEAD]
    output = layer.self_attn.o_proj.weight[:, head * HEAD : (head + 1) * HEAD]
    values.mul_(0.3)
    values[: len(read)] = read
    output[:, : len(read)] = 0
    output[write, range(len(read))] = weight


def _ramp(
    layer: Any,
    row: int,
    flag: int,
    constant: int,
    size: dict[int, float],
    at: float,
    target: int,
    slope: float,
) -> None:
    """Let a row of an MLP add `slope` for every one that a flag is above `at`."""
    steep = 60.0
    mlp = layer.mlp
    mlp.gate_proj.weight[row] = 0
    mlp.gate_proj.weight[row, flag] = steep / size[flag]
    mlp.gate_proj.weight[row, constant] = -steep * at / size[constant]
    mlp.up_proj.weight[row] = 0
    mlp.up_proj.weight[row, constant] = 1 / size[constant]
    mlp.down_proj.weight[:, row] = 0
    mlp.down_proj.weight[target, row] = slope / steep
