"""Weights to start from: a decoder that already averages two texts and compares the averages.

What tells policies apart is for the most part which tokens they use how often, how they begin, and
how long they go on. That is quickly found without a decoder: `real_pool_authors` trains vectors of
tokens whose averages over an answer and its first ids say which policy wrote it (seconds). In those
averages two answers of one policy are alike, and of a policy never seen as well; and they share
more of their ids (`real_pool_overlap`). From random
weights a decoder would need most of an hour to come to average the right ids and to compare; so
that much is written down, and training goes on from there:

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
from benchmarks.real_pool_overlap import FRESH, ROWS, Overlap, fit_overlap, fresh, numbers
from trainer.template import REWARD, SEPARATOR

HEAD = 32
BEGIN = 7  # ids that an answer begins with, the line break before it among them
SLOW = 15  # the pair of a head's dimensions that rotates least, with the one 16 further on
RECENT = {2: 32.0, 3: 48.0, 4: 16.0}
"""Pairs that rotate by 0.1, 0.03 and 0.01 an id; logits at distance 0.

Without the third an id 188 after a break looks as recent as one that is 6 after it."""
OLD = 91.0  # logit of "not recent", passed at a distance of about 5
SURE = 12.0  # logit of an id that is looked at, above those that are not
STEADY = [*range(7, 15), *range(23, 31)]
"""A head's dimensions that rotate by less than a third in all, where codes of tokens are compared.

Two tokens' codes differ in at least one of these 16 signs."""
SAME = 32.0  # logit of an id with the same code, so near a sink's that two are told from one
FOUND = 96.0  # logit of an id with the same code, well above one with another sign
CONSTANT, BREAK = 0.1, 0.4  # shares of a token's squares that are a constant, and a line break
CODE = 0.15  # and its code
SCALE = 0.1
"""Size of embeddings' entries."""
QUIET = 0.01
"""What random weights that write into the state are multiplied by."""
AVERAGE = 0.03
"""Size of the averages' entries, so small that the state's norm hardly depends on them."""
GROWN = 0.93
"""What is left of an entry after the norm once they are there (measured)."""
NUDGE = {1.0: -0.24, -1.0: 0.3}
"""What mends the sink's logit beside fresh ids of either side, as norms differ (measured)."""
FLAG, FAINT = 0.1, 0.04
"""Size of what an id learns of its place, and of whether it is fresh and lacking."""
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
    hidden, width = model.config.hidden_size, found.tokens.shape[1]
    own, fetched = (range(at, at + KEPT) for at in (width, width + KEPT))
    squares = range(fetched.stop, fetched.stop + 2 * KEPT)
    code = range(squares.stop, squares.stop + len(STEADY))
    evidence, constant, bos, separator, reward, newline, after, early, lines, first, prompt = range(
        code.stop, code.stop + 11
    )
    again, lacking, novel, fresh_own, fresh_fetched, absent = range(prompt + 1, prompt + 7)
    if hidden < max(8 * HEAD, absent + 1) or model.config.intermediate_size < 4 * KEPT + ROWS:
        msg = f"hidden must be {8 * HEAD} or more, intermediate {4 * KEPT + ROWS} or more"
        raise ValueError(msg)
    norm = SCALE * width**0.5  # of every embedding
    unit = hidden**0.5 / norm  # what a layer's norm makes of an entry
    table = model.model.embed_tokens.weight
    table.zero_()
    table[:, :width] = SCALE * found.tokens
    table[:, code] = norm * (CODE / len(code)) ** 0.5 * _codes(len(table))
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
        for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            matrix.mul_(QUIET)
            matrix[code.start : absent + 1] = 0
    zero, one, two = (layer for layer in model.model.layers[:3])
    entries = dict.fromkeys((bos, separator, reward), norm) | {
        constant: norm * CONSTANT**0.5,
        newline: norm * BREAK**0.5,
        **dict.fromkeys(code, norm * (CODE / len(code)) ** 0.5),
        **dict.fromkeys((after, early, lines, first, prompt), FLAG),
        **dict.fromkeys((again, lacking, novel), FAINT),
    }
    size = {flag: entry * unit for flag, entry in entries.items()}  # as a layer sees it

    def carry(layer: Any, head: int, flags: list[int], target: int, faint: bool = False) -> None:
        """The share of ids with one of the flags, as a flag of its own."""
        read = torch.zeros(1, hidden)
        for flag in flags:
            read[0, flag] = 1 / size[flag]
        _carry(layer, head, read, [target], FAINT if faint else FLAG)

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
    # the first of its kind in a half shares with the sink alone, the second with the first as well
    known = (constant, size)
    sinks = {bos: SAME, separator: early_only * (SAME + SURE)}
    _match(one, 1, known, code, SAME, {**sinks, after: SURE})
    carry(one, 1, [bos, separator], again, faint=True)
    near = FOUND * (1 - 1 / len(code))  # above an id with one other sign
    _match(one, 2, known, code, FOUND, {bos: near, after: -2 * SURE})
    carry(one, 2, [bos], lacking, faint=True)
    ramps = (
        (lines, prompt, 1.0, 0.6, 0.9),
        (lines, first, 1.0, 0.4, 0.48),
        (lines, first, -1.0, 0.6, 0.9),
        (again, novel, 1.0, 0.39, 0.44),
    )
    for number, (flag, target, sign, low, high) in enumerate(ramps):  # from 0 at low to sign
        slope = sign * entries[target] / (high - low)
        _ramp(one, 2 * number, flag, constant, size, low, target, slope)
        _ramp(one, 2 * number + 1, flag, constant, size, high, target, -slope)

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
        level = SURE * (1.5 + side / 2)  # of a fresh id
        few = level + float(np.log(FRESH)) + NUDGE[side]
        fresh_ids = {after: side * SURE, novel: SURE, bos: few}
        others = {prompt: -SURE, separator: -2 * SURE, reward: -2 * SURE}
        _look(two, 6 + number, scored, fresh_ids | others)
    share = torch.zeros(2, hidden)
    share[0, bos] = 1 / size[bos]
    _carry(two, 7, share[:1], [fresh_fetched], FLAG)
    share[1, lacking], share[1, bos] = 1 / size[lacking], -1 / size[bos]  # BOS lacks itself
    _carry(two, 6, share, [fresh_own, absent], FLAG)

    mlp, row = two.mlp, 0
    mlp.down_proj.weight[evidence] = 0
    each = EVIDENCE * overlap.ratio / (AVERAGE * GROWN * unit) ** 2
    differences, sums = (each * weights for weights in found.weights())
    # differences, sums; both ways, as silu(x) x + silu(-x) (-x) = x^2
    for sign, weights in ((-1.0, differences), (1.0, sums)):
        for i in range(KEPT):
            square = squares.start + i + (KEPT if sign > 0 else 0)
            for way in (-1.0, 1.0):
                for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
                    matrix[row] = 0
                    matrix[row, own[i]], matrix[row, fetched[i]] = way, sign * way
                mlp.down_proj.weight[:, row] = 0
                mlp.down_proj.weight[square, row] = 0.05
                mlp.down_proj.weight[evidence, row] = weights[i]
                row += 1
    rows = slice(row, row + ROWS)
    sizes = GROWN * torch.tensor([FLAG * unit] * 3 + [size[reward]])
    mlp.down_proj.weight[:, rows] = 0
    mlp.down_proj.weight[evidence, rows] = EVIDENCE * overlap.down
    for matrix, read in ((mlp.gate_proj.weight, overlap.gate), (mlp.up_proj.weight, overlap.up)):
        matrix[rows] = 0
        matrix[rows, [absent, fresh_own, fresh_fetched, reward]] = read / sizes
    model.score.weight.zero_()
    model.score.weight[0, evidence] = 1 / (EVIDENCE * GROWN * unit)


def _codes(tokens: int) -> Tensor:
    """A sign in each of the steady dimensions for every token, no two tokens alike, (V, 16)."""
    drawn = torch.randperm(2 ** len(STEADY), generator=torch.Generator().manual_seed(0))[:tokens]
    return 2.0 * (drawn[:, None] >> torch.arange(len(STEADY)) & 1) - 1


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


def _match(
    layer: Any,
    head: int,
    query: tuple[int, dict[int, float]],
    code: range,
    level: float,
    keys: dict[int, float],
) -> None:
    """As `_look`, and an id with the query's code has `level` more, others less by their signs."""
    _look(layer, head, query, keys)
    rows = slice(head * HEAD, (head + 1) * HEAD)
    for matrix in (layer.self_attn.q_proj.weight[rows], layer.self_attn.k_proj.weight[rows]):
        matrix[STEADY] = 0
        matrix[STEADY, list(code)] = (level * HEAD**0.5 / len(code)) ** 0.5 / query[1][code[0]]


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
