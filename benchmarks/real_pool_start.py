"""Weights to start from: a decoder that already averages two texts and compares the averages.

What tells policies apart is for the most part which tokens they use how often, how they begin, and
how long they go on. That is quickly found without a decoder: `real_pool_authors` trains vectors of
tokens whose averages over an answer and its first ids say which policy wrote it (seconds). In those
averages two answers of one policy are alike, and of a policy never seen as well; and they share
more of their ids (`real_pool_overlap`). From random weights a decoder would need most of an hour to
come to average the right ids and to compare; so that much is written down, and training goes on
from there:

- embeddings hold those vectors, a code for each token, and which are special or break a line;
- layer 0: every id learns whether it comes after the separator, and whether just after a break;
- layer 1: it learns how many lines its half has had: the prompt stands on the first, the answer
  begins on the second (in a prompt of several lines that is wrong, and costs little); by the code,
  whether it is fresh in its half, and whether the first half lacks it;
- layer 2: the scored id averages the answers on both sides, their first ids, and how long they
  are, in directions in which answers of one policy are alike, and counts their fresh ids; its MLP
  squares differences and sums of the two sides, and weighs them as in the likelihood ratio of one
  policy against two. The score is that ratio, and what shared ids say.

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
from benchmarks.real_pool_heads import (
    BREAK,
    CODE,
    CONSTANT,
    FAINT,
    FLAG,
    HEAD,
    RECENT,
    SCALE,
    State,
    carry,
    codes,
    look,
    match,
    ramp,
)
from benchmarks.real_pool_overlap import FRESH, ROWS, Overlap, fit_overlap, fresh, numbers
from trainer.template import REWARD, SEPARATOR

BEGIN = 7  # ids that an answer begins with, the line break before it among them
OLD = 91.0  # logit of "not recent", passed at a distance of about 5
SURE = 12.0  # logit of an id that is looked at, above those that are not
SAME = 32.0  # logit of an id with the same code, so near a sink's that two are told from one
FOUND = 96.0  # logit of an id with the same code, well above one with another sign
QUIET = 0.01
"""What random weights that write into the state are multiplied by."""
AVERAGE = 0.03
"""Size of the averages' entries, so small that the state's norm hardly depends on them."""
GROWN = 0.93
"""What is left of an entry after the norm once they are there (measured)."""
NUDGE = {1.0: -0.24, -1.0: 0.3}
"""What mends the sink's logit beside fresh ids of either side, as norms differ (measured)."""
EVIDENCE = 0.05
"""Size of one logit's entry."""

Lesson = tuple[np.ndarray, np.ndarray]
"""Rows that authors are told apart on; and groups (n, K + 2) of other policies' rows."""


def first_weights(
    tokenizer_path: Path,
    out: Path,
    texts: list[str],
    policies: np.ndarray,
    prompts: list[str],
    lessons: list[Lesson],
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
        prompts: what they answer.
        lessons: on which it is learned how much shared ids say; a group is a reference, an answer
            of its policy and others.
        hidden: width, a multiple of 32, at least 256.
        layers: at least three.
        intermediate: width of the MLPs, at least `4 * KEPT + ROWS`.
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
    asked = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    known = np.clip(known, -3, 3)
    overlap = _overlap(rows, policies, asked, lessons, known, room(breaks), seed)
    found = authors(rows, policies, known, room(breaks), early(), seed=seed)
    with torch.no_grad():
        _write(model, tokenizer, found, overlap, torch.from_numpy(breaks))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def room(breaks: np.ndarray) -> np.ndarray:
    """Root mean square of a token's vector: flags and code have the rest of its squares."""
    return (1 - CONSTANT - CODE - BREAK * breaks) ** 0.5


def _overlap(
    rows: list[list[int]],
    policies: np.ndarray,
    asked: list[list[int]],
    lessons: list[Lesson],
    known: np.ndarray,
    sizes: np.ndarray,
    seed: int,
) -> Overlap:
    """How much shared ids say beside the likelihood ratio, where that does not know the policies.

    On policies that it knows the ratio looks much better than it is on others.
    """
    likelihoods, shared = [], []
    for learned, groups in lessons:
        own = [rows[i] for i in learned]
        found = authors(own, policies[learned], known, sizes, early(), seed=seed)
        used, place = np.unique(groups, return_inverse=True)
        place = place.reshape(groups.shape)
        at = found.positions([rows[i] for i in used], early())[torch.from_numpy(place)]
        likelihoods.append(found.likelihood(at[:, :1], at[:, 1:]))
        ids = [fresh(rows[i], [rows[i][0], *asked[i]]) for i in used]
        shared += [[numbers(ids[first], ids[i]) for i in others] for first, *others in place]
    return fit_overlap(torch.cat(likelihoods), torch.tensor(shared), seed=seed)


def early() -> Tensor:
    """How much the ids from a line break on weigh among those that an answer begins with.

    A head of layer 0 says how recent the break is, by `RECENT`; one of layer 2 looks accordingly.
    """
    distance = torch.arange(BEGIN)
    logits = [logit * torch.cos(10 ** (-pair / 2) * distance) for pair, logit in RECENT.items()]
    recent = torch.sigmoid(torch.stack(logits).sum(0) - OLD)
    return (SURE * (recent - 1)).exp()


def _write(model: Any, tokenizer: Any, found: Authors, overlap: Overlap, breaks: Tensor) -> None:
    """Put tokens into embeddings, looking and comparing into heads; see the top of this room."""
    state = State(model.config.hidden_size, found.tokens.shape[1])
    needed = max(8 * HEAD, state.written.stop)
    if state.hidden < needed or model.config.intermediate_size < 4 * KEPT + ROWS:
        msg = f"hidden must be {needed} or more, intermediate {4 * KEPT + ROWS} or more"
        raise ValueError(msg)
    _embed(model.model.embed_tokens.weight, tokenizer, state, found.tokens, breaks)
    for layer in model.model.layers:  # what is random stays below what is written down
        for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            matrix.mul_(QUIET)
            matrix[state.written] = 0
    zero, one, two = model.model.layers[:3]
    _place(zero, one, state)
    _match_codes(one, state)
    _fetch(two, state, found)
    _compare(two.mlp, state, found, overlap)
    model.score.weight.zero_()
    model.score.weight[0, state.evidence] = 1 / (EVIDENCE * GROWN * state.unit)


def _embed(table: Tensor, tokenizer: Any, state: State, vectors: Tensor, breaks: Tensor) -> None:
    """Write every token's vector, code and flags."""
    table.zero_()
    table[:, : state.width] = SCALE * vectors
    table[:, state.code] = state.entry[state.code[0]] * codes(len(table))
    table[:, state.constant] = state.entry[state.constant]
    table[:, state.newline] = state.entry[state.newline] * breaks
    for token, flag in (
        (tokenizer.bos_token_id, state.bos),
        (tokenizer.convert_tokens_to_ids(SEPARATOR), state.separator),
        (tokenizer.convert_tokens_to_ids(REWARD), state.reward),
    ):
        table[token] = 0
        table[token, flag] = state.norm


def _place(zero: Any, one: Any, state: State) -> None:
    """Which half an id is in, whether just after a line break, and on which line of its half."""
    every = (state.constant, state.size)
    look(zero, 0, every, {state.separator: SURE})
    carry(zero, 0, state.read({state.separator: 1}), [state.after], FLAG)
    look(zero, 1, every, {state.bos: OLD}, recent=state.newline)
    carry(zero, 1, state.read({state.newline: 1}), [state.early], FLAG)
    # the first line of a half is the separator's or BOS's share of all its line breaks
    sinks = {state.bos: SURE * state.left(1), state.separator: 2 * SURE * state.left(2)}
    look(one, 0, every, {state.newline: SURE, state.after: SURE, **sinks})
    carry(one, 0, state.read({state.bos: 1, state.separator: 1}), [state.lines], FLAG)
    ramp(one, 0, state, state.lines, state.prompt, 0.6, 0.9)
    ramp(one, 2, state, state.lines, state.first, 0.4, 0.48)
    ramp(one, 4, state, state.lines, state.first, 0.6, 0.9, sign=-1)


def _match_codes(one: Any, state: State) -> None:
    """Whether an id is the first of its kind in its half, and whether the first half lacks it."""
    every = (state.constant, state.size)
    # the first shares with the sink alone, the second with the first as well
    sinks = {state.bos: SAME, state.separator: state.left(1) * (SAME + SURE)}
    match(one, 1, every, state.code, SAME, {**sinks, state.after: SURE})
    carry(one, 1, state.read({state.bos: 1, state.separator: 1}), [state.again], FAINT)
    ramp(one, 6, state, state.again, state.novel, 0.39, 0.44)
    near = FOUND * (1 - 1 / len(state.code))  # above an id with one other sign
    match(one, 2, every, state.code, FOUND, {state.bos: near, state.after: -2 * SURE})
    carry(one, 2, state.read({state.bos: 1}), [state.lacking], FAINT)


def _fetch(two: Any, state: State, found: Authors) -> None:
    """Averages of both answers and of their first ids, how long they are, how many are fresh."""
    scored = (state.reward, state.size)
    whole = state.read(*[{state.constant: offset} for offset in found.offset.tolist()])
    whole[:, : state.width] = found.whole / (SCALE * state.unit)
    begin = torch.zeros(KEPT, state.hidden)
    begin[:, : state.width] = found.begin / (SCALE * state.unit)
    length = state.read(*[{state.bos: weight} for weight in found.length.tolist()])
    far = SURE + float(np.log(LENGTH))
    for number, (side, target) in enumerate(((1.0, state.own), (-1.0, state.fetched))):
        sinks = {state.bos: -SURE, state.separator: -SURE}
        answer = {state.after: side * SURE, state.prompt: -SURE, **sinks}
        look(two, number, scored, answer)
        carry(two, number, whole, list(target), AVERAGE)
        beginning = {state.after: side * SURE, state.first: SURE, state.early: SURE}
        look(two, 2 + number, scored, beginning)
        carry(two, 2 + number, begin, list(target), AVERAGE)
        look(two, 4 + number, scored, answer | {state.bos: far if side > 0 else far - SURE})
        carry(two, 4 + number, length, list(target), AVERAGE)
        level = SURE * (1.5 + side / 2)  # of a fresh id
        few = {state.bos: level + float(np.log(FRESH)) + NUDGE[side]}
        others = {state.prompt: -SURE, state.separator: -2 * SURE, state.reward: -2 * SURE}
        fresh_ids = {state.after: side * SURE, state.novel: SURE}
        look(two, 6 + number, scored, fresh_ids | few | others)
    absent = {state.lacking: 1.0, state.bos: -1.0}  # BOS lacks itself
    counted = state.read({state.bos: 1}, absent)
    carry(two, 6, counted, [state.fresh_own, state.absent], FLAG)
    carry(two, 7, counted[:1], [state.fresh_fetched], FLAG)


def _compare(mlp: Any, state: State, found: Authors, overlap: Overlap) -> None:
    """Squares of differences and sums of both sides, and evidence of them and of shared ids."""
    row = 0
    each = EVIDENCE * overlap.ratio / (AVERAGE * GROWN * state.unit) ** 2
    differences, sums = (each * weights for weights in found.weights())
    # both ways, as silu(x) x + silu(-x) (-x) = x^2
    for sign, weights in ((-1.0, differences), (1.0, sums)):
        for i in range(KEPT):
            square = state.squares[i + (KEPT if sign > 0 else 0)]
            for way in (-1.0, 1.0):
                for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
                    matrix[row] = 0
                    matrix[row, state.own[i]] = way
                    matrix[row, state.fetched[i]] = sign * way
                mlp.down_proj.weight[:, row] = 0
                mlp.down_proj.weight[square, row] = 0.05
                mlp.down_proj.weight[state.evidence, row] = weights[i]
                row += 1
    rows = slice(row, row + ROWS)
    mlp.down_proj.weight[:, rows] = 0
    mlp.down_proj.weight[state.evidence, rows] = EVIDENCE * overlap.down
    flags = [state.absent, state.fresh_own, state.fresh_fetched, state.reward]
    sizes = GROWN * torch.tensor([state.size[flag] for flag in flags])
    for matrix, weights in ((mlp.gate_proj.weight, overlap.gate), (mlp.up_proj.weight, overlap.up)):
        matrix[rows] = 0
        matrix[rows, flags] = weights / sizes
