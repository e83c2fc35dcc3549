"""The task of `bench-real-pool`: who may stand in which cell, and drawing its groups.

Answers are those of `oasst_sampling`. Sides are fixed by hashes of the names of policy groups and
prompt groups, so everybody who reads the same files gets the same sides. A group is a reference,
another answer of its policy and answers of policies of other groups, all to one prompt. Whoever
may be a negative could as well be the positive there: every policy in a draw has two or more
usable answers to that prompt, and all are drawn alike, so the candidates alone say nothing.

Nothing is trained or scored here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import sparse

from pipelines.minhash import shingles
from trainer.data import GROUPS_SCHEMA

SOURCE = "oasst_sampling"
CELLS = {  # cell: (policies held out, prompts held out)
    "seen": (False, False),
    "new_policy": (True, False),
    "new_prompt": (False, True),
    "both_new": (True, True),
}
HELD_OUT = 0.2
SHORTEST = 20
"""Texts must be longer than this many characters."""
NEAR = 0.8
"""Jaccard similarity of word 5-grams from which two answers to one prompt are ambiguous."""


def held_out(tag: str, name: str) -> bool:
    """Whether a policy group (tag `bench-policy-1`) or prompt group (`bench-prompt-1`) is."""
    digest = hashlib.sha1(f"{tag}\0{name}".encode()).hexdigest()
    return int(digest[:12], 16) / 16**12 < HELD_OUT


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Usable answers, one row each, sorted by prompt, and which two of them are ambiguous.

    `near` holds, per row, the rows of the same prompt that are equal or nearly equal to it.
    """

    prompt_text: dict[str, str]
    prompt: np.ndarray
    prompt_group: np.ndarray
    policy: np.ndarray
    policy_group: np.ndarray
    sample: np.ndarray
    text: np.ndarray
    near: dict[int, set[int]]
    counts: Counter[str] = field(default_factory=Counter)

    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each answer whether its policy group and its prompt group are held out."""
        sides = []
        for tag, names in (
            ("bench-policy-1", self.policy_group),
            ("bench-prompt-1", self.prompt_group),
        ):
            known = {name: held_out(tag, name) for name in set(names)}
            sides.append(np.array([known[name] for name in names]))
        return sides[0], sides[1]

    def rows_of(self, cell: str) -> np.ndarray:
        """The answers whose policy and prompt are on the cell's sides."""
        policies, prompts = self.sides()
        return np.flatnonzero((policies == CELLS[cell][0]) & (prompts == CELLS[cell][1]))


def read_pool(data: Path) -> Pool:
    """The usable answers of `data/trajectories.parquet`, prompt groups from `data/prompts.parquet`.

    Too short a text is no answer of the task; it is counted.
    """
    columns = ["prompt_id", "prompt", "policy", "policy_group", "response", "sample_index"]
    table = pq.read_table(
        data / "trajectories.parquet",
        columns=columns,
        filters=[("source", "=", SOURCE), ("origin", "=", "model")],
    )
    counts = Counter(read=table.num_rows)
    longer = pc.utf8_length(pc.utf8_trim_whitespace(table.column("response")))
    table = table.filter(pc.greater(longer, SHORTEST))
    counts["short"] = counts["read"] - table.num_rows
    table = table.sort_by([(n, "ascending") for n in ("prompt_id", "policy", "sample_index")])
    prompts = pq.read_table(data / "prompts.parquet", columns=["prompt_id", "prompt_group"])
    group_of = dict(zip(*(prompts.column(i).to_pylist() for i in (0, 1)), strict=True))
    prompt = np.array(table.column("prompt_id").to_pylist(), object)
    return Pool(
        prompt_text=dict(zip(prompt, table.column("prompt").to_pylist(), strict=True)),
        prompt=prompt,
        prompt_group=np.array([group_of[p] for p in prompt], object),
        policy=np.array(table.column("policy").to_pylist(), object),
        policy_group=np.array(table.column("policy_group").to_pylist(), object),
        sample=table.column("sample_index").to_numpy(),
        text=np.array(table.column("response").to_pylist(), object),
        near=_near(prompt, table.column("response").combine_chunks()),
        counts=counts,
    )


def _near(prompt: np.ndarray, texts: pa.StringArray) -> dict[int, set[int]]:
    """Per answer the others to its prompt with a Jaccard similarity of `NEAR` or more."""
    hashes, offsets = shingles(texts)
    near: dict[int, set[int]] = {}
    edges = np.flatnonzero(np.r_[True, prompt[1:] != prompt[:-1], True])
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        own = hashes[offsets[first] : offsets[last]]
        rows = np.repeat(np.arange(last - first), np.diff(offsets[first : last + 1]))
        columns = np.unique(own, return_inverse=True)[1]
        bags = sparse.csr_matrix((np.ones(len(own), np.float32), (rows, columns)))
        bags.data[:] = 1  # sets: a repeated shingle counts once
        sizes = np.asarray(bags.sum(axis=1)).reshape(-1)
        shared = (bags @ bags.T).tocoo()
        union = sizes[shared.row] + sizes[shared.col] - shared.data
        alike = (shared.data >= NEAR * union) & (shared.row != shared.col)
        for a, b in zip(shared.row[alike] + first, shared.col[alike] + first, strict=True):
            near.setdefault(int(a), set()).add(int(b))
    return near


def draw(
    pool: Pool,
    cell: str,
    groups: int,
    *,
    negatives: int = 3,
    seed: int = 1,
    kin: float = 0.0,
    without: set[frozenset[int]] | None = None,
    among: np.ndarray | None = None,
) -> list[list[int]]:
    """Groups of a cell as rows of the pool: reference, positive, negatives.

    A prompt is drawn, then policies of different groups, then an answer of each and two of the
    first. A draw in which any two texts are ambiguous is made again. The same arguments give the
    same groups.

    Args:
        pool: the answers.
        cell: one of `CELLS`.
        groups: how many.
        negatives: of each group, fewer where a prompt has not so many policy groups.
        seed: of the draws.
        kin: share of groups whose negatives come from the positive's own family first.
        without: pairs of reference and positive that must not be drawn.
        among: rows to draw from, instead of all rows of the cell.
    """
    rng = np.random.default_rng([seed, list(CELLS).index(cell)])
    choices = _choices(pool, pool.rows_of(cell) if among is None else among)
    drawn: list[list[int]] = []
    while len(drawn) < groups:
        policies = choices[int(rng.integers(len(choices)))]
        picked: list[np.ndarray] = []
        taken: set[str] = set()
        order = rng.permutation(len(policies))
        if kin and rng.random() < kin:
            families = [family(pool.policy_group[policies[i][0]]) for i in order]
            order = order[np.argsort([name != families[0] for name in families], kind="stable")]
        for i in order:
            group = pool.policy_group[policies[i][0]]
            if group not in taken:
                taken.add(group)
                picked.append(policies[i])
            if len(picked) == negatives + 1:
                break
        reference, positive = (int(i) for i in rng.choice(picked[0], 2, replace=False))
        answers = [reference, positive, *(int(rng.choice(own)) for own in picked[1:])]
        if any(b in pool.near.get(a, ()) for a in answers for b in answers):
            pool.counts[f"{cell}: ambiguous"] += 1
        elif without and frozenset(answers[:2]) in without:
            pool.counts[f"{cell}: held out"] += 1
        else:
            drawn.append(answers)
    return drawn


def family(policy_group: str) -> str:
    """The base model that a policy group's name tells of, or the name itself."""
    names = (
        "pythia",
        "llama-30b",
        "llama-13b",
        "llama-2",
        "llama2",
        "llama",
        "falcon",
        "oasst-sft",
    )
    return next((name for name in names if name in policy_group), policy_group)


def groups_table(pool: Pool, drawn: list[list[int]], cell: str, split: str) -> pa.Table:
    """Drawn groups with `GROUPS_SCHEMA`; ids count from 0."""
    rows = [
        _row(pool, f"{cell}-{number:07d}", answers, cell, split)
        for number, answers in enumerate(drawn)
    ]
    return pa.Table.from_pylist(rows, GROUPS_SCHEMA)


def _choices(pool: Pool, among: np.ndarray) -> list[list[np.ndarray]]:
    """Per prompt the answers of every policy that has two or more there."""
    found: dict[str, dict[str, list[int]]] = {}
    for row in among:
        found.setdefault(pool.prompt[row], {}).setdefault(pool.policy[row], []).append(int(row))
    choices = []
    for _, policies in sorted(found.items()):
        usable = [np.array(rows) for _, rows in sorted(policies.items()) if len(rows) > 1]
        if len({pool.policy_group[rows[0]] for rows in usable}) > 3:
            choices.append(usable)
    return choices


def _row(pool: Pool, name: str, answers: list[int], cell: str, split: str) -> dict:
    reference = answers[0]
    return {
        "group_id": name,
        "wrapper": "sft",  # prompts are instructions: answers begin on a line of their own
        "prompt": [{"role": "user", "content": pool.prompt_text[pool.prompt[reference]]}],
        "reference": pool.text[reference],
        "candidates": [
            {
                "trajectory_id": f"{pool.prompt[row]}|{pool.policy[row]}|{pool.sample[row]}",
                "text": pool.text[row],
                "rank": int(number > 0),
                "policy_id": pool.policy[row],
                "relation": None if number == 0 else "other_family",
                "policy_group": pool.policy_group[row],
            }
            for number, row in enumerate(answers[1:])
        ],
        "category": SOURCE,
        "split": split,
        "cell": cell,
        "prompt_group": pool.prompt_group[reference],
        "policy_group": pool.policy_group[reference],
    }
