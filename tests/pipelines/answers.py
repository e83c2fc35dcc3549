"""Small worlds of answers, as the lake query of pairs and groups would give them."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from pipelines import ids


@dataclass(frozen=True)
class Answer:
    """One row in words that a test can read."""

    prompt: str
    policy: str
    sample: int = 0
    text: str = ""
    sampling: str = "default"
    group: str = ""
    family: str = ""
    step: int | None = None
    policy_side: str = "train"
    prompt_side: str = "train"
    cluster: str | None = None
    empty: bool = False
    source: str = "made"

    @property
    def prompt_id(self):
        return ids.content_id("prompt", self.source, self.prompt)

    @property
    def policy_id(self):
        return ids.content_id("policy", self.policy)

    @property
    def id(self):
        return ids.content_id(
            "trajectory", self.policy_id, self.prompt_id, self.sampling, self.sample
        )

    @property
    def words(self):
        return self.text or f"{self.prompt} {self.policy} {self.sample} {self.sampling}"


def answers_table(answers, permutations=8):
    """The rows of `labels.INPUT_SQL`, sorted as it sorts them."""
    rows = sorted(answers, key=lambda r: (r.prompt_id, r.id))

    def column(name):
        return ids.array([getattr(r, name) for r in rows])

    clusters = [r.cluster and ids.content_id("cluster", r.prompt, r.cluster) for r in rows]
    signature = [
        np.random.default_rng(sum(r.words.encode())).integers(0, 3, permutations, dtype=np.uint32)
        for r in rows
    ]
    return pa.table(
        {
            "trajectory_id": column("id"),
            "prompt_id": column("prompt_id"),
            "policy_id": column("policy_id"),
            "sampling_id": ids.array([ids.content_id("sampling", r.sampling) for r in rows]),
            "content_hash": ids.array([ids.content_id("text", r.words) for r in rows]),
            "length": pa.array([len(r.words) for r in rows], pa.int32()),
            "empty": pa.array([r.empty for r in rows], pa.bool_()),
            "policy": pa.array([r.policy for r in rows], pa.string()),
            "policy_group": pa.array([r.group or r.policy for r in rows], pa.string()),
            "family": pa.array([r.family or r.group or r.policy for r in rows], pa.string()),
            "lineage_step": pa.array([r.step for r in rows], pa.int64()),
            "policy_side": pa.array([r.policy_side for r in rows], pa.string()),
            "prompt_side": pa.array([r.prompt_side for r in rows], pa.string()),
            "category": pa.array([None] * len(rows), pa.string()),
            "source": pa.array([r.source for r in rows], pa.string()),
            "cluster_id": ids.array(clusters),
            "signature": pa.array(signature, pa.list_(pa.uint32(), permutations)),
        }
    )


POLICIES = {
    # name: (group, family, step, side)
    "run@1": ("run", "fam", 1, "train"),
    "run@2": ("run", "fam", 2, "train"),
    "run@2-copy": ("run", "fam", 2, "train"),
    "cousin": ("cousin", "fam", None, "train"),
    "cousin-terse": ("cousin", "fam", None, "train"),
    "stranger": ("stranger", "stranger", None, "train"),
    "held@1": ("held", "held", 1, "test"),
    "held@2": ("held", "held", 2, "test"),
    "other-held": ("other-held", "held", None, "test"),
    "unknown:made": ("unknown:made", "unknown", None, "train"),
}


@st.composite
def worlds(draw, prompts=3, samples=3):
    """Answers of named and unnamed policies with copies, blanks and several samplings."""
    answers = []
    for number in range(draw(st.integers(1, prompts))):
        prompt, side = f"p{number}", draw(st.sampled_from(["train", "test"]))
        for policy in draw(st.lists(st.sampled_from(sorted(POLICIES)), unique=True)):
            group, family, step, policy_side = POLICIES[policy]
            for sample in range(draw(st.integers(0, samples))):
                text = draw(st.sampled_from(["", "", "", "copied", "long copied text"]))
                cluster = draw(st.sampled_from([None, None, None, "c", "d"]))
                answers.append(
                    Answer(
                        prompt=prompt,
                        policy=policy,
                        sample=sample,
                        text=text,
                        sampling=draw(st.sampled_from(["default", "greedy"])),
                        group=group,
                        family=family,
                        step=step,
                        policy_side=policy_side,
                        prompt_side=side,
                        cluster=f"of {text}" if text else cluster,
                        empty=draw(st.sampled_from([False] * 5 + [True])),
                        source=f"source{number % 2}",
                    )
                )
    return answers
