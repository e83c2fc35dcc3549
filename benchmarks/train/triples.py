"""Real triples as token ids, cut into steps that every contender runs.

A group is a reference, a positive (another sample of the same policy on the prompt) and K - 1
negatives of other policy groups. A step has 21 pairs: 21, 7 or 3 groups. Which tokenizer made the
ids belongs to `bench`; how they are run to the contenders.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

PAIRS = 21
SOURCE = "oasst_sampling"
Sequences = list[list[int]]
"""A group's ids: the positive's whole sequence, then each negative's."""


@dataclass(frozen=True)
class Triples:
    """One prompt, one reference, a positive and K - 1 negatives, as texts."""

    prompt: str
    reference: str
    candidates: list[str]


def draw(data: Path, candidates: int, count: int, rng: np.random.Generator) -> list[Triples]:
    """Draw `count` groups, each from a random prompt, without the same reference twice.

    Negatives come from policies that could be the positive as well (two or more usable samples).

    Raises:
        ValueError: the folder's data do not hold that many.
    """
    table = pq.read_table(data / "trajectories.parquet")
    table = table.filter(pc.equal(table["source"], SOURCE))
    samples: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    owner: dict[str, str] = {}
    prompts: dict[str, str] = {}
    columns = ("prompt_id", "prompt", "policy", "policy_group", "response")
    for name, prompt, policy, group, text in zip(
        *(table[column].to_pylist() for column in columns), strict=True
    ):
        if text and len(text) > 20 and text not in samples[name][policy]:
            samples[name][policy].append(text)
            owner[policy], prompts[name] = group, prompt
    names, found, used = sorted(prompts), [], set()
    for _ in range(50 * count):
        if len(found) == count:
            return found
        name = names[rng.integers(len(names))]
        policies = [p for p, texts in sorted(samples[name].items()) if len(texts) > 1]
        if not policies:
            continue
        mine = policies[rng.integers(len(policies))]
        reference, positive = rng.permutation(samples[name][mine])[:2].tolist()
        others, groups = [], {owner[mine]}
        for policy in rng.permutation(policies).tolist():
            if owner[policy] not in groups:
                groups.add(owner[policy])
                texts = samples[name][policy]
                others.append(texts[rng.integers(len(texts))])
        wanted = others[: candidates - 1]
        if len(wanted) < candidates - 1 or positive in wanted or (name, reference) in used:
            continue
        used.add((name, reference))
        found.append(Triples(prompts[name], reference, [positive, *wanted]))
    message = f"{data}: {len(found)} groups of {candidates} in {SOURCE}, {count} were asked for"
    raise ValueError(message)


def longest(group: Sequences) -> int:
    """Ids of a group's longest sequence."""
    return max(map(len, group))


def shared_prefix(group: Sequences) -> int:
    """Ids that all of a group's sequences begin with; each keeps one of its own."""
    least = min(map(len, group)) - 1
    rows = np.array([row[:least] for row in group])
    differs = np.flatnonzero((rows != rows[0]).any(axis=0))
    return int(differs[0]) if len(differs) else least


def pairs(group: Sequences) -> list[tuple[list[int], list[int]]]:
    """Chosen and rejected ids, the positive before each negative."""
    return [(group[0], other) for other in group[1:]]


def steps(groups: Sequence[Sequences], candidates: int) -> list[list[Sequences]]:
    """Groups in their order, cut into steps of `PAIRS` pairs; what is left over is not run."""
    size = PAIRS // (candidates - 1)
    return [list(groups[at : at + size]) for at in range(0, len(groups) - size + 1, size)]


def repeats(all_steps: Sequence[list[Sequences]], count: int) -> list[list[list[Sequences]]]:
    """Steps of each repeat: one to warm up, two to time."""
    return [list(all_steps[3 * r : 3 * r + 3]) for r in range(count)]


def by_length(
    timed: Sequence[Sequence[list[tuple[list[int], list[int]]]]],
) -> list[list[list[tuple[list[int], list[int]]]]]:
    """The pairs of all repeats' two timed steps, sorted by length over all of them, cut again.

    This is what grouping by length can reach at best. Repeat r gets the batch of rank r and its
    mirror image, so that every repeat has short and long ones and about the same work.
    """
    every = [pair for repeat in timed for step in repeat for pair in step]
    every.sort(key=lambda pair: -max(map(len, pair)))
    size = len(timed[0][0])
    cut = [every[at : at + size] for at in range(0, len(every), size)]
    return [[cut[r], cut[-1 - r]] for r in range(len(timed))]


def ids_of_padded(step: Sequence[tuple[list[int], list[int]]], micro: int = PAIRS) -> int:
    """Ids that padded pairs run: every part's rows are as long as its longest."""
    total = 0
    for at in range(0, len(step), micro):
        part = step[at : at + micro]
        total += 2 * len(part) * max(len(row) for pair in part for row in pair)
    return total


def ids_of_shared(step: Sequence[Sequences]) -> int:
    """Ids of which each is run once: prefixes, and what each candidate has of its own."""
    return sum(
        (before := shared_prefix(group)) + sum(len(row) - before for row in group) for group in step
    )
