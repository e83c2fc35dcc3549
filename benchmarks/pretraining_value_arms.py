"""One lesson of `bench-pretraining-value`: an arm fine-tuned, or rulers fitted, and then measured.

Which lessons there are, at which rates, and what they add up to is said in `pretraining_value`.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.pretraining_value_items import Judgement, beside, groups_of, ranked
from benchmarks.pretraining_value_report import BLIND, FULL
from trainer.comparisons import compare, read_rows
from trainer.loop import train
from trainer.model import RewardModel
from trainer.rulers import fit_rulers
from trainer.score import Scorer
from trainer.settings import TrainSettings
from trainer.template import Limits

RULERS = ("length", "tfidf", "surface_logistic", "surface_boosting")
EPOCHS = {50: 6, 200: 3, None: 1}
STEPS = 50
"""A fine-tuning has about as many; the more judgements, the larger the batch."""
LIMITS = Limits(324, 128)
PROMPT = 120
"""An answer is read to its 128th id, a prompt from its 120th last character on. So nearly no prompt
has to be cut to what the answers leave, and answers beside one reference share what is before."""
MADE = "ranked"
"""How judgements become groups; another word keeps outcomes of other ways apart."""


class Part(NamedTuple):
    """One fine-tuning, or one fitting of rulers; with size 0, what there is before any."""

    size: int | None
    seed: int
    fold: int

    @property
    def name(self) -> str:
        """As it stands in file names."""
        return f"{shown(self.size)}-seed{self.seed}-fold{self.fold}"


def shown(size: int | None) -> str:
    """A size in file names and tables."""
    return "all" if size is None else str(size)


def fine_tuned(
    part: Part,
    arm: str,
    rate: float,
    learned: list[Judgement],
    held_out: list[Judgement],
    folder: Path,
    given: argparse.Namespace,
) -> np.ndarray:
    """Fine-tune an arm; whether it then prefers the better answer of each judgement held out."""
    torch.set_num_threads(1)
    start = given.pretrained if arm == FULL else given.start
    learned, held_out = shortened(learned), shortened(held_out)
    if not learned:
        scorer = Scorer(RewardModel.start(start, wrapper="sft", limits=LIMITS))
        return preferred(scorer, held_out, reference=arm != BLIND)
    parts = ranked(learned)
    settings = TrainSettings(
        lr=rate,
        epochs=EPOCHS[part.size],
        batch_groups=max(1, len(parts) * EPOCHS[part.size] // STEPS),
        seed=part.seed,
        micro_tokens=8192,  # a tenth faster than twice as many
        max_length=LIMITS.max_length,
        max_response_length=LIMITS.max_response_length,
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as scratch:
        groups, out = Path(scratch) / "groups.parquet", Path(scratch) / "run"
        pq.write_table(groups_of(parts, reference=arm != BLIND, split="train"), groups)
        train([groups], start, out, settings, stage="finetune")
        return preferred(Scorer.load(out), held_out, reference=arm != BLIND)


def shortened(judgements: list[Judgement]) -> list[Judgement]:
    """The judgements with as much of their prompts as is read."""
    return [replace(each, prompt=each.prompt[-PROMPT:]) for each in judgements]


def preferred(scorer: Scorer, judgements: list[Judgement], *, reference: bool) -> np.ndarray:
    """Per judgement whether the better answer scores higher, 0.5 for a tie.

    An answer that was judged several times beside one reference is scored once.
    """
    places: dict[tuple[str, str, str], int] = {}
    pairs = []
    for judgement in judgements:
        for answer in (judgement.chosen, judgement.rejected):
            text = (judgement.prompt, beside(judgement, reference=reference), answer)
            pairs.append(places.setdefault(text, len(places)))
    fields = ("prompt", "reference", "output")
    items = [dict(zip(fields, text, strict=True)) for text in places]
    scores = scorer.score(items, batch_tokens=2048)  # so much fits into a core's cache
    chosen, rejected = scores[pairs].reshape(-1, 2).T
    return (np.sign(chosen - rejected) + 1) / 2


def fitted(
    part: Part, learned: list[Judgement], held_out: list[Judgement]
) -> dict[str, np.ndarray]:
    """Fit the rulers; whether each then prefers the better answer."""
    lessons = compare(read_rows(groups_of(ranked(learned), reference=True, split="train")))
    single = [[judgement] for judgement in held_out]  # in their order
    comparisons = compare(read_rows(groups_of(single, reference=True, split="eval")))
    rulers = fit_rulers(lessons, RULERS, seed=part.seed)
    return {name: comparisons.outcomes(ruler(comparisons.items)) for name, ruler in rulers.items()}
