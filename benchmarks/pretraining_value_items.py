"""The judgements of `bench-pretraining-value`: who was better, beside which reference.

From `preferences` (annotators of one pair outvote each other; a draw is no judgement) and
`ranked_triples`. The reference of a judgement is the best answer of a ranked triple that ends in
its two answers, else the prompt's own reference, else another answer to the prompt that won most
and was beaten by none. Where there is none of these, only an arm without reference can judge.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data import GROUPS_SCHEMA

FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One answer was judged better than another; `origin` says where the reference is from."""

    source: str
    prompt: str
    prompt_group: str
    chosen: str
    rejected: str
    reference: str | None
    origin: str

    @property
    def fold(self) -> int:
        """The fold of its prompt group: all of one prompt group are measured together."""
        digest = hashlib.sha1(f"pretraining-value\0{self.prompt_group}".encode()).hexdigest()
        return int(digest[:12], 16) % FOLDS


@functools.cache
def read_judgements(data: Path) -> tuple[list[Judgement], Counter[str]]:
    """All judgements in a fixed order, and counts of what was read, left out and found."""
    prompts = {row["prompt_id"]: row for row in pq.read_table(data / "prompts.parquet").to_pylist()}
    counts: Counter[str] = Counter()
    votes: dict[tuple[str, str, str], int] = defaultdict(int)
    about: dict[str, dict[str, Any]] = {}
    for row in pq.read_table(data / "preferences.parquet").to_pylist():
        counts["read"] += 1
        about[row["prompt_id"]] = row
        one, other = sorted((row["response_a"], row["response_b"]))
        if one == other:
            counts["equal answers"] += 1
            continue
        vote = {"a": 1, "b": -1, "tie": 0}[row["preference"]]
        votes[row["prompt_id"], one, other] += vote if row["response_a"] == one else -vote
    best: dict[tuple[str, str, str], str] = {}
    for row in pq.read_table(data / "ranked_triples.parquet").to_pylist():
        best.setdefault((row["prompt_id"], row["response_2"], row["response_3"]), row["response_1"])
    wins: dict[str, Counter[str]] = defaultdict(Counter)
    beaten: set[tuple[str, str]] = set()
    decided = []
    for (prompt, one, other), vote in sorted(votes.items()):
        if not vote:
            counts["undecided"] += 1
            continue
        winner, loser = (one, other) if vote > 0 else (other, one)
        decided.append((prompt, winner, loser))
        wins[prompt][winner] += 1
        beaten.add((prompt, loser))
    judgements = []
    for prompt, winner, loser in decided:
        reference, origin = best.get((prompt, winner, loser)), "triple"
        if reference is None:
            reference, origin = prompts[prompt]["reference"], "prompt"
        if reference is None or reference in (winner, loser):
            others = [
                (-won, answer)
                for answer, won in wins[prompt].items()
                if answer not in (winner, loser) and (prompt, answer) not in beaten
            ]
            reference, origin = (min(others)[1], "judged best") if others else (None, "none")
        source = about[prompt]["source"]
        counts[f"{source}: {origin}"] += 1
        judgements.append(
            Judgement(
                source=source,
                prompt=about[prompt]["prompt"],
                prompt_group=prompts[prompt]["prompt_group"],
                chosen=winner,
                rejected=loser,
                reference=reference,
                origin=origin,
            )
        )
    return judgements, counts


def ranked(judgements: list[Judgement]) -> list[list[Judgement]]:
    """The judgements in parts that a ranking of answers to one prompt says exactly.

    Of answers that were judged beside one reference, directly or through others, a ranking has to
    say all that was judged and nothing else; where none does, each judgement is a part.
    """
    alike: dict[tuple[str, str | None], list[list[Judgement]]] = defaultdict(list)
    for judgement in judgements:
        parts, own = alike[judgement.prompt, judgement.reference], _answers([judgement])
        joined = [each for part in parts if _answers(part) & own for each in part]
        parts[:] = [part for part in parts if not _answers(part) & own] + [[*joined, judgement]]
    found = []
    for part in (part for parts in alike.values() for part in parts):
        ranks = ranks_of(part)
        said = [pair for pair in permutations(ranks, 2) if ranks[pair[0]] < ranks[pair[1]]]
        judged = sorted((each.chosen, each.rejected) for each in part)
        found += [part] if sorted(said) == judged else [[each] for each in part]
    return found


def ranks_of(judgements: list[Judgement]) -> dict[str, int]:
    """Per answer how often it was judged worse."""
    losses = Counter(judgement.rejected for judgement in judgements)
    return {text: losses[text] for text in sorted(_answers(judgements), key=losses.__getitem__)}


def _answers(judgements: list[Judgement]) -> set[str]:
    return {text for each in judgements for text in (each.chosen, each.rejected)}


def beside(judgement: Judgement, *, reference: bool) -> str:
    """What an answer is judged beside: nothing where there is no reference, or none is wanted."""
    return (judgement.reference or "") if reference else ""


def groups_of(parts: list[list[Judgement]], *, reference: bool, split: str) -> pa.Table:
    """A group of ranked answers for each part; without `reference` its place is empty."""
    rows = [
        {
            "group_id": f"{number:06d}",
            "wrapper": "sft",
            "prompt": [{"role": "user", "content": part[0].prompt}],
            "reference": beside(part[0], reference=reference),
            "candidates": [{"text": text, "rank": rank} for text, rank in ranks_of(part).items()],
            "category": part[0].source,
            "split": split,
            "cell": "new_prompt",
            "prompt_group": part[0].prompt_group,
            "policy_group": "unknown",
        }
        for number, part in enumerate(parts)
    ]
    return pa.Table.from_pylist(rows, GROUPS_SCHEMA)
