"""Blocks: who meets whom in policy discrimination, so that only the reference tells the positive.

A block is K policies, each with a reference and a candidate of its own. It gives K groups over the
same K candidates, and each candidate is the positive once, where its own policy's reference
stands. So of any two candidates each beats the other once: whatever can be seen without the
reference (policy, length, style) is right exactly half of the time, in every single block.

Plain functions over the answers to one prompt; tables and Beam are in `groups`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import permutations
from random import Random
from typing import NamedTuple

from pydantic import Field

from pipelines.labels import Answers
from pipelines.settings import Settings


class GroupSettings(Settings):
    """How groups are made and how many are kept."""

    candidates: int = Field(default=4, ge=2, description="K; fewer where fewer policies can")
    rounds: int = Field(default=4, ge=1, description="times each policy is drawn on each prompt")
    sibling_share: float = Field(
        default=0.25, ge=0, le=1, description="of the rounds, with siblings put into one block"
    )
    length_matched_share: float = Field(
        default=0.25, ge=0, le=1, description="of the rounds, with blocks of alike lengths"
    )
    require_same_sampling: bool = Field(
        default=True, description="of reference and positive; recorded data have none to require"
    )
    seen_eval_share: float = Field(
        default=0.1, ge=0, lt=1, description="of answers on the train side, kept for evaluation"
    )
    train_groups: int | None = Field(default=20_000, ge=1, description="at most, about")
    eval_groups_per_cell: int = Field(default=600, ge=0, description="at most, about")
    sibling_groups_per_cell: int = Field(
        default=300, ge=0, description="evaluation groups against one sibling, at most, about"
    )
    seed: int = Field(default=0, ge=0)

    def limit(self, kind: str, split: str) -> int | None:
        """How many groups of a kind (`groups` or `siblings`) a split or cell may hold."""
        if split == "train":
            return self.train_groups
        return self.sibling_groups_per_cell if kind == "siblings" else self.eval_groups_per_cell


class Draw(NamedTuple):
    """One policy's part in a block: row numbers of its reference and of its candidate."""

    reference: int
    candidate: int


Block = list[Draw]


class Rows:
    """The columns that blocks go by, as Python lists: rows are looked up one at a time."""

    def __init__(self, x: Answers) -> None:
        self.policy = x.policy.tolist()
        self.group = x.group.tolist()
        self.step = x.step.tolist()
        self.sampling = x.sampling.tolist()
        self.length = x.length.tolist()
        self.text = x.text.tolist()
        self.cluster = x.cluster.tolist()
        self.usable = (~x.empty).tolist()
        self.unknown = x.unknown.tolist()

    def marks(self, row: int) -> set[int]:
        """Numbers that two rows share if and only if their texts are equal or near-equal."""
        cluster = self.cluster[row]
        return {self.text[row]} if cluster < 0 else {self.text[row], -1 - cluster}

    def tellable(self, row: int, other: int) -> bool:
        """Whether the policies of two rows differ in group or in declared step."""
        return self.group[row] != self.group[other] or self.siblings(row, other)

    def siblings(self, row: int, other: int) -> bool:
        """Whether the policies of two rows are two declared steps of one group."""
        steps = (self.step[row], self.step[other])
        return self.group[row] == self.group[other] and -1 not in steps and steps[0] != steps[1]


def parts(rows: Rows, own: Iterable[int], same_sampling: bool) -> tuple[list[Draw], str]:
    """What one policy could draw on one prompt, and if nothing, why.

    A reference and a candidate are two answers that are not blank, not equal and not near-equal
    and, where it is required, decoded alike. A policy without them cannot be the positive there,
    so it must not be a negative either.
    """
    own = list(own)
    if rows.unknown[own[0]]:
        return [], "unknown_policy"
    if len(own) < 2:
        return [], "one_sample"
    usable = [row for row in own if rows.usable[row]]
    if len(usable) < 2:
        return [], "empty"
    alike = [
        Draw(r, c)
        for r, c in permutations(usable, 2)
        if not same_sampling or rows.sampling[r] == rows.sampling[c]
    ]
    if not alike:
        return [], "sampling"
    draws = [draw for draw in alike if not rows.marks(draw.reference) & rows.marks(draw.candidate)]
    return draws, "" if draws else "ambiguous"


def make_blocks(
    rows: Rows, pool: Mapping[int, list[Draw]], settings: GroupSettings, random: Random
) -> list[Block]:
    """Blocks of one prompt from what each policy can draw.

    In each round every policy draws once. Policies then stand in random order, by run (so that
    siblings meet), or by length of their candidates; blocks are cut from that order.
    """
    turns = {policy: random.sample(draws, len(draws)) for policy, draws in pool.items()}
    blocks: list[Block] = []
    for turn in range(settings.rounds):
        order = [draws[turn % len(draws)] for draws in turns.values()]
        random.shuffle(order)
        manner = random.random()
        if manner < settings.sibling_share:
            runs = {rows.group[draw.reference]: random.random() for draw in order}
            order.sort(key=lambda draw: runs[rows.group[draw.reference]])
        elif manner < settings.sibling_share + settings.length_matched_share:
            order.sort(key=lambda draw: rows.length[draw.candidate])
        blocks += cut(rows, order, settings.candidates)
    return blocks


def sibling_blocks(
    rows: Rows, pool: Mapping[int, list[Draw]], settings: GroupSettings, random: Random
) -> list[Block]:
    """Blocks of two siblings each, to measure them apart."""
    runs: dict[int, list[list[Draw]]] = defaultdict(list)
    for draws in pool.values():
        if rows.step[draws[0].reference] >= 0:
            runs[rows.group[draws[0].reference]].append(random.sample(draws, len(draws)))
    blocks: list[Block] = []
    for turns in runs.values():
        for turn in range(settings.rounds):
            order = [draws[turn % len(draws)] for draws in turns]
            random.shuffle(order)
            blocks += cut(rows, order, 2)
    return blocks


def cut(rows: Rows, order: list[Draw], size: int) -> Iterator[Block]:
    """Cut blocks of `size` from draws in order; one that does not fit waits for the next block.

    It fits where its policy can be told from those in the block and none of its two texts is equal
    or near-equal to any of theirs. The last blocks may be smaller; one draw alone is left over.
    """
    while len(order) > 1:
        block: Block = []
        taken: set[int] = set()
        waiting: list[Draw] = []
        for draw in order:
            marks = rows.marks(draw.reference) | rows.marks(draw.candidate)
            if (
                len(block) < size
                and not taken & marks
                and all(rows.tellable(draw.reference, member.reference) for member in block)
            ):
                block.append(draw)
                taken |= marks
            else:
                waiting.append(draw)
        if len(block) > 1:
            yield block
        order = waiting


def once(
    blocks: Iterable[Block], seen: set[tuple[Draw, frozenset[int]]]
) -> tuple[list[Block], list[Block]]:
    """Blocks of which no group is in `seen` yet (then it is), and the others."""
    kept: list[Block] = []
    repeated: list[Block] = []
    for block in blocks:
        candidates = frozenset(draw.candidate for draw in block)
        groups = {(draw, candidates) for draw in block}
        if groups & seen:
            repeated.append(block)
        else:
            kept.append(block)
            seen |= groups
    return kept, repeated
