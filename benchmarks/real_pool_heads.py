"""What a layer's heads and MLP can be made to do by writing their weights down.

A state has entries for a token's vector, for what is compared, for a code of the token, and for
flags: what an id is, and what layers find out about its place. Weights that are not written stay.
Who writes what is in `real_pool_start`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.real_pool_authors import KEPT

HEAD = 32
SLOW = 15  # the pair of a head's dimensions that rotates least, with the one 16 further on
RECENT = {2: 32.0, 3: 48.0, 4: 16.0}
"""Pairs that rotate by 0.1, 0.03 and 0.01 an id; logits at distance 0.

Without the third an id 188 after a break looks as recent as one that is 6 after it."""
STEADY = [*range(7, 15), *range(23, 31)]
"""A head's dimensions that rotate by less than a third in all, where codes of tokens are compared.

Two tokens' codes differ in at least one of these 16 signs."""
CONSTANT, BREAK = 0.1, 0.4  # shares of a token's squares that are a constant, and a line break
CODE = 0.15  # and its code
SCALE = 0.1
"""Size of embeddings' entries."""
FLAG, FAINT = 0.1, 0.04
"""Size of what an id learns of its place, and of whether it is fresh and lacking."""


class State:
    """Which entries of an id's state hold what, and how large they are."""

    def __init__(self, hidden: int, width: int) -> None:
        """`width`: entries of a token's vector, which come first."""
        self.hidden, self.width = hidden, width
        self.own, self.fetched = (range(at, at + KEPT) for at in (width, width + KEPT))
        self.squares = range(self.fetched.stop, self.fetched.stop + 2 * KEPT)
        self.code = range(self.squares.stop, self.squares.stop + len(STEADY))
        self.written = range(self.code.start, self.code.stop + 17)
        self.evidence, self.constant = self.code.stop, self.code.stop + 1
        self.bos, self.separator, self.reward, self.newline, self.after = self.written[18:23]
        self.early, self.lines, self.first, self.prompt = self.written[23:27]
        self.again, self.lacking, self.novel = self.written[27:30]
        self.fresh_own, self.fresh_fetched, self.absent = self.written[30:33]
        self.norm = SCALE * width**0.5  # of every embedding
        self.unit = hidden**0.5 / self.norm  # what a layer's norm makes of an entry
        self.entry = {
            **dict.fromkeys((self.bos, self.separator, self.reward), self.norm),
            self.constant: self.norm * CONSTANT**0.5,
            self.newline: self.norm * BREAK**0.5,
            **dict.fromkeys(self.code, self.norm * (CODE / len(self.code)) ** 0.5),
            **dict.fromkeys((self.after, self.early, self.lines, self.first, self.prompt), FLAG),
            **dict.fromkeys((self.again, self.lacking, self.novel), FAINT),
            **dict.fromkeys((self.fresh_own, self.fresh_fetched, self.absent), FLAG),
        }
        self.size = {flag: entry * self.unit for flag, entry in self.entry.items()}
        """As a layer sees them."""

    def left(self, flags: int) -> float:
        """What is left of an entry's size where an id has so many flags of its place."""
        return 1 / (1 + flags * FLAG**2 / self.norm**2) ** 0.5

    def read(self, *entries: dict[int, float]) -> Tensor:
        """Rows (n, E) that read flags by their weights."""
        rows = torch.zeros(len(entries), self.hidden)
        for row, weights in zip(rows, entries, strict=True):
            for flag, weight in weights.items():
                row[flag] = weight / self.size[flag]
        return rows


def codes(tokens: int) -> Tensor:
    """A sign in each of the steady dimensions for every token, no two tokens alike, (V, 16)."""
    drawn = torch.randperm(2 ** len(STEADY), generator=torch.Generator().manual_seed(0))[:tokens]
    return 2.0 * (drawn[:, None] >> torch.arange(len(STEADY)) & 1) - 1


def look(
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


def match(
    layer: Any,
    head: int,
    query: tuple[int, dict[int, float]],
    code: range,
    level: float,
    keys: dict[int, float],
) -> None:
    """As `look`, and an id with the query's code has `level` more, others less by their signs."""
    look(layer, head, query, keys)
    rows = slice(head * HEAD, (head + 1) * HEAD)
    for matrix in (layer.self_attn.q_proj.weight[rows], layer.self_attn.k_proj.weight[rows]):
        matrix[STEADY] = 0
        matrix[STEADY, list(code)] = (level * HEAD**0.5 / len(code)) ** 0.5 / query[1][code[0]]


def carry(layer: Any, head: int, read: Tensor, write: list[int], weight: float) -> None:
    """What a head reads of the ids that it looks at, (n, E), and where that goes."""
    values = layer.self_attn.v_proj.weight[head * HEAD : (head + 1) * HEAD]
    output = layer.self_attn.o_proj.weight[:, head * HEAD : (head + 1) * HEAD]
    values.mul_(0.3)
    values[: len(read)] = read
    output[:, : len(read)] = 0
    output[write, range(len(read))] = weight


def ramp(
    layer: Any,
    row: int,
    state: State,
    flag: int,
    target: int,
    low: float,
    high: float,
    *,
    sign: float = 1.0,
) -> None:
    """Let two rows of an MLP set a flag where another is above `high`, and not below `low`."""
    steep, slope = 60.0, sign * state.entry[target] / (high - low)
    mlp = layer.mlp
    for at, rise in ((low, slope), (high, -slope)):
        mlp.gate_proj.weight[row] = state.read({flag: steep, state.constant: -steep * at})[0]
        mlp.up_proj.weight[row] = state.read({state.constant: 1})[0]
        mlp.down_proj.weight[:, row] = 0
        mlp.down_proj.weight[target, row] = rise / steep
        row += 1
