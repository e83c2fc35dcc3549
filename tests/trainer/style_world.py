"""Groups of a small world in which every policy has words and habits of its own."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from trainer.data import GROUPS_SCHEMA

POLICIES = 12  # the last three are held out


def style(policy: int, rng: np.random.Generator) -> str:
    words = [f"habit{policy}" for _ in range(2)] + [f"w{i}" for i in rng.integers(40, size=6)]
    rng.shuffle(words)
    return " ".join(words) + (".", "!", "?")[policy % 3]


def group(number, wrapper, prompt, reference, candidates, **columns) -> dict:
    """One row; candidates are (text, rank, policy, relation)."""
    return {
        "group_id": f"g{number:05d}",
        "wrapper": wrapper,
        "prompt": [{"role": "user", "content": prompt}],
        "reference": reference,
        "candidates": [
            {
                "trajectory_id": f"t{number}-{index}",
                "text": text,
                "rank": rank,
                "policy_id": f"p{policy}",
                "relation": relation,
                "policy_group": f"p{policy}",
            }
            for index, (text, rank, policy, relation) in enumerate(candidates)
        ],
        "category": None,
        "split": "train",
        "cell": "seen",
        "prompt_group": prompt,
        "policy_group": "unknown",
    } | columns


def discrimination(groups: int = 400, *, seed: int = 0, leak: bool = False) -> pa.Table:
    """Policy groups in all four cells; with `leak`, even policies are never the positive."""
    rng = np.random.default_rng(seed)
    rows = []
    while len(rows) < groups:
        held_out = rng.random() < 0.25
        side = range(9, 12) if held_out else range(9)
        positive, *negatives = rng.permutation(side)[:3]
        if leak and positive % 2 == 0:
            continue
        new = rng.random() < 0.25
        cell = ("both_new" if new else "new_policy") if held_out else ("new_prompt" if new else "")
        candidates = [(style(positive, rng), 0, positive, "same")]
        for index, policy in enumerate(negatives):
            relation = "sibling" if index == 0 and rng.random() < 0.2 else "other_family"
            candidates.append((style(policy, rng), 1, policy, relation))
        prompt = f"{'new' if new else 'old'} question {rng.integers(40)}"
        rows.append(
            group(
                len(rows),
                "pretrain",
                prompt,
                style(positive, rng),
                candidates,
                cell=cell or "seen",
                split="eval" if cell or rng.random() < 0.2 else "train",
                policy_group=f"p{positive}",
            )
        )
    return pa.Table.from_pylist(rows, GROUPS_SCHEMA)


def preference(groups: int = 120, *, seed: int = 1) -> pa.Table:
    """Three ranked answers a prompt: by and large, the more words of the reference the better."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(groups):
        words = [f"w{i}" for i in rng.integers(40, size=8)]
        kept = 6 - 2 * np.arange(3) + rng.integers(-2, 3, size=3)
        answers = [
            (" ".join(words[: max(k, 0)] + ["filler"] * (8 - max(k, 0))), rank, 0, "same")
            for rank, k in enumerate(kept)
        ]
        rows.append(
            group(
                number,
                "sft",
                f"question {number // 2}",
                " ".join(words),
                answers[::-1],
                category=("sums", "rhymes", None)[number % 3],
                split="eval" if number % 2 else "train",
                cell=("seen", "new_prompt")[number % 4 // 2],
            )
        )
    return pa.Table.from_pylist(rows, GROUPS_SCHEMA)


def knows_style(items: list[dict]) -> np.ndarray:
    """A perfect model of this world: habits and words shared with the reference."""
    return np.array(
        [len(set(i["reference"].split()) & set(i["output"].split())) for i in items]
    ) + np.array([5.0 * (habit(i["reference"]) == habit(i["output"])) for i in items])


def habit(text: str) -> str:
    return next((w.strip(".!?") for w in text.split() if w.startswith("habit")), "")
