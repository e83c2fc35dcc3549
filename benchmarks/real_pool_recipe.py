"""The recipe of `bench-real-pool`: from nothing to a checkpoint, on answers of the training cell.

A byte-level tokenizer; weights that know whose tokens are whose and where a comparison looks
(`real_pool_start`); then a few careful minutes of ranks with seven negatives a reference, some of
them from the positive's own family of models. More of it, or telling whose the texts are and what
can be measured of them, raises the training cell and lowers policies that are new: see
`docs/experiments.md`. A phase can still ask for both (`trainer.guided`).

What is drawn and from where belongs to `real_pool_task`; no held-out answer is read here.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow.parquet as pq
import torch
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.preprocessing import normalize
from transformers import AutoTokenizer

from benchmarks.real_pool_start import Lesson, first_weights
from benchmarks.real_pool_task import Pool, draw, groups_table
from trainer.guided import Guide, GuidedSettings, train_guided
from trainer.ids_cache import cached_ids
from trainer.language_model import train_tokenizer
from trainer.packing import Ids, Progress
from trainer.surface import text_features
from trainer.template import Limits, Template

VOCABULARY = 16384
CONTEXT = 2048
LONGEST = 384
"""Ids of an answer that are read; the mean answer has about 230."""
SIZE = {"hidden": 256, "layers": 3, "intermediate": 512}
LIMITS = Limits(2 * LONGEST + 2 * 48 + 4, LONGEST)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the training: what it sees and for which share of the time."""

    name: str
    kin: float
    share: float
    settings: GuidedSettings


PHASES = (
    Phase(
        name="ranks",
        kin=0.3,
        share=1.0,
        settings=GuidedSettings(lr=5e-6, batch_groups=6, numbers=0.0, classes=0.0, first=0),
    ),
)
NEGATIVES = 7
PARTS, PART_GROUPS = 4, 1500
"""Of the policies, each of which in turn says how much shared ids say; and its groups."""

EDGE = 60
"""Characters of an answer's beginning and end that are compared on their own."""


class Measures:
    """What can be measured of answers of a pool and of two of them, computed once a text."""

    def __init__(self, pool: Pool, rows: np.ndarray) -> None:
        """`rows`: the answers that are asked for; words are weighed by how many of them have it."""
        self.place = np.full(len(pool.text), -1)
        self.place[rows] = np.arange(len(rows))
        texts = pool.text[rows]
        self.own = text_features(list(texts))
        words = _vectors("word", (1, 1)).transform(texts)
        self.sets = words.sign()
        self.spaces = [
            TfidfTransformer(sublinear_tf=True).fit_transform(words),
            normalize(_vectors("char", (1, 3)).transform([text[:EDGE] for text in texts])),
            normalize(_vectors("char", (1, 3)).transform([text[-EDGE:] for text in texts])),
        ]

    def pairs(self, reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        """Numbers about every reference and candidate, (n, F)."""
        reference, candidate = self.place[reference], self.place[candidate]
        left, right = self.own[reference], self.own[candidate]
        shared = _products(self.sets, reference, candidate)
        size = np.asarray(self.sets.sum(axis=1)).reshape(-1)
        a, b = size[reference], size[candidate]
        logs = left[:, 0] - right[:, 0]  # of the lengths
        return np.column_stack(
            [
                np.abs(left - right),
                left,
                right,
                *(np.sqrt(_products(space, reference, candidate)) for space in self.spaces),
                shared / np.maximum(a + b - shared, 1),
                shared / np.maximum(a, 1),
                shared / np.maximum(b, 1),
                logs,
            ]
        )


def _vectors(analyzer: str, ngrams: tuple[int, int]) -> HashingVectorizer:
    return HashingVectorizer(
        analyzer=analyzer,
        token_pattern=r"\w+|[^\w\s]",
        ngram_range=ngrams,
        n_features=2**16,
        norm=None,
        alternate_sign=False,
        lowercase=analyzer == "word",
    )


def _products(rows: sparse.csr_matrix, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    found = np.empty(len(left))
    for start in range(0, len(left), 20_000):
        part = slice(start, start + 20_000)
        found[part] = np.asarray(rows[left[part]].multiply(rows[right[part]]).sum(1)).reshape(-1)
    return found


def guide_of(pool: Pool, measures: Measures, drawn: list[list[int]]) -> Guide:
    """The guide of drawn groups: standardised numbers, and the policies of the two texts."""
    reference = np.repeat([answers[0] for answers in drawn], [len(a) - 1 for a in drawn])
    candidate = np.concatenate([answers[1:] for answers in drawn])
    numbers = measures.pairs(reference, candidate)
    numbers -= numbers.mean(axis=0)
    numbers /= np.maximum(numbers.std(axis=0), 1e-6)
    names, codes = np.unique(pool.policy.astype(str), return_inverse=True)
    classes = np.stack([codes[reference], codes[candidate]], axis=1)
    return Guide(
        numbers=np.clip(numbers, -4, 4).astype(np.float32),
        classes=classes,
        sizes=(len(names), len(names)),
    )


def make(task: Any, folder: Path, *, minutes: float, threads: int, groups: int) -> Path:
    """Train for about `minutes` and return the checkpoint; what is done already is not done again.

    Stop it whenever you like: the same call goes on where training was.
    """
    torch.set_num_threads(threads)
    final = folder / PHASES[-1].name
    if (final / "training.json").is_file():
        return final
    own = task.pool.rows_of("seen")
    tokenizer, start = folder / "tokenizer", folder / "start"
    some = np.random.default_rng(0).permutation(own)
    if not (tokenizer / "tokenizer.json").is_file():
        train_tokenizer(list(task.pool.text[some[:12_000]]), VOCABULARY, tokenizer, context=CONTEXT)
    if not (start / "tokenizer.json").is_file():
        _, policies = np.unique(task.pool.policy[some].astype(str), return_inverse=True)
        texts = list(task.pool.text[some])
        prompts = [task.pool.prompt_text[name] for name in task.pool.prompt[some]]
        lessons = _apart(task, some)
        shape = {"context": CONTEXT, "longest": LONGEST, **SIZE}
        first_weights(tokenizer, start, texts, policies, prompts, lessons, **shape)
    for number, phase in enumerate(PHASES):
        out = folder / phase.name
        ids, guide = _lesson(task, folder, phase, tokenizer, groups, seed=100 + number)
        seconds = 60 * minutes * phase.share
        settings = phase.settings.model_copy(update={"max_seconds": seconds, "epochs": 50})
        train_guided(
            ids,
            guide,
            start,
            out,
            settings,
            limits=LIMITS,
            wrapper="sft",
            progress=_told(phase, seconds),
        )
        start = out
    return final


def _apart(task: Any, some: np.ndarray) -> list[Lesson]:
    """For each part of the policy groups, answers of all others, and groups of its own.

    Args:
        task: whose pool is drawn from.
        some: rows of the pool; what is returned counts in these.
    """
    part = np.array([crc32(name.encode()) % PARTS for name in task.pool.policy_group[some]])
    place = np.full(len(task.pool.text), -1)
    place[some] = np.arange(len(some))
    lessons, without = [], task.kept_apart
    for number in range(PARTS):
        own, rest = np.sort(some[part == number]), np.flatnonzero(part != number)
        seed = 200 + number
        drawn = draw(task.pool, "seen", PART_GROUPS, seed=seed, without=without, among=own)
        lessons.append((rest, place[np.array(drawn)]))
    return lessons


def _lesson(
    task: Any, folder: Path, phase: Phase, tokenizer: Path, groups: int, seed: int
) -> tuple[Ids, Guide]:
    """Token ids and guide of a phase's groups, kept in files."""
    file, kept = (folder / f"groups-{phase.name}.{end}" for end in ("parquet", "npz"))
    template = Template(AutoTokenizer.from_pretrained(tokenizer), LIMITS)
    if not (file.is_file() and kept.is_file()):
        drawn = draw(
            task.pool,
            "seen",
            groups,
            negatives=NEGATIVES,
            seed=seed,
            kin=phase.kin,
            without=task.kept_apart,
        )
        pq.write_table(groups_table(task.pool, drawn, "seen", "train"), file)
        ids, _ = cached_ids([file], template, folder / "cache")
        used = [drawn[int(name.rsplit("-", 1)[1])] for name in ids.group_ids]
        measures = Measures(task.pool, np.unique(np.concatenate(used)))
        draft = kept.with_name("draft.npz")
        np.savez(draft, **asdict(guide_of(task.pool, measures, used)))
        draft.replace(kept)
    ids, _ = cached_ids([file], template, folder / "cache")
    with np.load(kept) as found:
        return ids, Guide(
            numbers=found["numbers"],
            classes=found["classes"],
            sizes=tuple(int(size) for size in found["sizes"]),
        )


def _told(phase: Phase, seconds: float) -> Progress:
    """Lines on standard error, at most two a minute, with what is left of the phase."""
    last = time.monotonic() - 30

    def line(done: int, total: int, note: str) -> None:
        nonlocal last
        if time.monotonic() - last >= 30 or done == total:
            last = time.monotonic()
            left = seconds * (1 - done / total) / 60
            said = f"{phase.name}: {note}; {left:.0f} min of each thread left"
            print(said, file=sys.stderr, flush=True)

    return line
