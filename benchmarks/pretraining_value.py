"""What is pre-training worth on real preferences?

    make bench-pretraining-value                            # or, with choices of one's own:
    python -m benchmarks.pretraining_value [--pretrained FOLDER] [--start FOLDER] [--minutes 600]

Three arms are fine-tuned on the same judgements and measured on the same others: from the
pre-trained checkpoint of `bench-real-pool`, from random weights of the same shape (all that this
checkpoint knows it has from the pool's answers), and from those without a reference. Five folds by
prompt group, 50, 200 or all judgements to learn from, three seeds. Rulers are fitted on the same
judgements. Accuracy is the mean over sources, so a large source does not outweigh a small one;
intervals resample prompt groups. Each arm has the rate, of three, at which 50 judgements taught it
most about others that are not measured in that fold.

Every fine-tuning leaves its outcomes in POLAR_HOME/pretraining-value and is not made again: stop it
whenever you like. The last line is JSON; the table is in `report.html` there, beside the paper's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from assets.home import PROJECT, polar_home
from benchmarks.pretraining_value_items import FOLDS, Judgement, groups_of, read_judgements
from benchmarks.pretraining_value_report import BLIND, FULL, PLAIN, write_value_report
from benchmarks.real_pool_recipe import PHASES
from trainer.comparisons import compare, read_rows
from trainer.loop import train
from trainer.rulers import fit_rulers
from trainer.score import Scorer
from trainer.settings import TrainSettings
from trainer.template import Limits

ARMS = (FULL, PLAIN, BLIND)
RULERS = ("length", "tfidf", "surface_logistic", "surface_boosting")
SIZES: tuple[int | None, ...] = (50, 200, None)  # None: all
SEEDS = (0, 1, 2)
RATES = (1e-4, 5e-4, 2e-3)
EPOCHS = {50: 6, 200: 3, None: 1}
STEPS = 50
"""A fine-tuning has about as many; the more judgements, the larger the batch."""
LIMITS = Limits(452, 192)
"""An answer is read to its 192nd id; the recipe's limits would cost twice as much."""
TRIED = 500
"""Judgements that a rate is chosen on."""
FEW = 20
"""A source with fewer judgements of a kind does not count in the mean over sources."""


class Part(NamedTuple):
    """One fine-tuning, or one fitting of rulers."""

    size: int | None
    seed: int
    fold: int

    @property
    def name(self) -> str:
        """As it stands in file names."""
        return f"{self.size or 'all'}-seed{self.seed}-fold{self.fold}"


def main() -> None:
    given = parser().parse_args()
    torch.set_num_threads(given.threads)
    judgements, counts = read_judgements(given.data)
    print(dict(sorted(counts.items())), file=sys.stderr)
    home = polar_home() / "pretraining-value"
    given.start = given.start or untrained(given.pretrained, home / "untrained")
    folder = home / identity(given.pretrained, given.start)
    folder.mkdir(parents=True, exist_ok=True)
    rates = {arm: rate_of(arm, judgements, folder, given) for arm in ARMS}
    began, parts = time.monotonic(), list(all_parts())
    for number, part in enumerate(parts):
        if time.monotonic() - began > 60 * given.minutes:
            print(f"{given.minutes:g} minutes are over; the same command goes on", file=sys.stderr)
            break
        made = fit(part, judgements, folder)
        made += sum(run(part, arm, rates[arm], judgements, folder, given) for arm in ARMS)
        if made:
            each = (time.monotonic() - began) / (number + 1)
            left = each * (len(parts) - number - 1) / 60
            print(f"{part.name}: done; about {left:.0f} min left", file=sys.stderr, flush=True)
    found = results(judgements, folder)
    paths = write_value_report(folder, found)
    print(paths["md"].read_text(encoding="utf-8"))
    print(json.dumps({"folder": str(folder), "counts": counts, "rates": rates, "rows": found}))


def parser() -> argparse.ArgumentParser:
    home = polar_home() / "real-pool"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared/data/open")
    parser.add_argument("--pretrained", type=Path, default=home / PHASES[-1].name)
    parser.add_argument("--start", type=Path, help="weights of the arms that are not pre-trained")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def untrained(pretrained: Path, out: Path) -> Path:
    """Write random weights of a checkpoint's shape, with its tokenizer."""
    torch.manual_seed(0)
    network = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(pretrained))
    network.save_pretrained(out)
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(out)
    return out


def identity(*folders: Path) -> str:
    """A short hash of the weights that the arms start from, and of how they are fine-tuned."""
    total = hashlib.blake2b(repr((RATES, EPOCHS, STEPS, LIMITS, TRIED)).encode(), digest_size=6)
    for folder in folders:
        total.update((folder / "model.safetensors").read_bytes())
    return total.hexdigest()


def all_parts() -> Iterator[Part]:
    """Small sets first, and every fold of a seed before the next seed."""
    for size in SIZES:
        for seed in SEEDS:
            for fold in range(FOLDS):
                yield Part(size, seed, fold)


def shuffled(judgements: list[Judgement], part: Part) -> list[Judgement]:
    """What may be learned from: of other folds, with a reference, the same for every arm."""
    usable = [j for j in judgements if j.fold != part.fold and j.reference is not None]
    order = np.random.default_rng([part.seed, part.fold]).permutation(len(usable))
    return [usable[i] for i in order]


def lesson(judgements: list[Judgement], part: Part) -> list[Judgement]:
    """What is learned from."""
    return shuffled(judgements, part)[: part.size]


def measured(judgements: list[Judgement], fold: int, *, reference: bool) -> list[Judgement]:
    """What a fold measures; an arm that needs a reference cannot judge without one."""
    own = [j for j in judgements if j.fold == fold]
    return [j for j in own if j.reference is not None] if reference else own


def rate_of(
    arm: str, judgements: list[Judgement], folder: Path, given: argparse.Namespace
) -> float:
    """The best rate for an arm on judgements beside a lesson of 50; what each did is kept."""
    file = folder / f"rates-{arm.replace(' ', '_')}.json"
    tried: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    part = Part(SIZES[0], SEEDS[0], 0)
    learned = lesson(judgements, part)
    groups = {j.prompt_group for j in learned}
    others = [j for j in shuffled(judgements, part) if j.prompt_group not in groups][:TRIED]
    for rate in RATES:
        if str(rate) not in tried:
            outcomes = fine_tuned(part, arm, rate, learned, others, folder, given)
            tried[str(rate)] = _macro(others, {arm: outcomes}, arm, None)["value"]
            file.write_text(json.dumps(tried))
            print(f"{arm}, rate {rate:g}: {tried[str(rate)]:.3f}", file=sys.stderr, flush=True)
    return max(RATES, key=lambda rate: tried[str(rate)])


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
    groups, out = folder / "groups.parquet", folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    pq.write_table(groups_of(learned, reference=arm != BLIND, split="train"), groups)
    settings = TrainSettings(
        lr=rate,
        epochs=EPOCHS[part.size],
        batch_groups=max(1, len(learned) * EPOCHS[part.size] // STEPS),
        seed=part.seed,
        max_length=LIMITS.max_length,
        max_response_length=LIMITS.max_response_length,
    )
    start = given.pretrained if arm == FULL else given.start
    train([groups], start, out, settings, stage="finetune")
    table = groups_of(held_out, reference=arm != BLIND, split="eval")
    scores = np.array(Scorer.load(out).score_groups(table))
    shutil.rmtree(out)
    return (np.sign(scores[:, 0] - scores[:, 1]) + 1) / 2


def run(
    part: Part,
    arm: str,
    rate: float,
    judgements: list[Judgement],
    folder: Path,
    given: argparse.Namespace,
) -> bool:
    """Fine-tune an arm on a part and keep the outcomes; False where that is done already."""
    file = folder / f"{arm.replace(' ', '_')}-{part.name}.npz"
    if file.is_file():
        return False
    learned = lesson(judgements, part)
    held_out = measured(judgements, part.fold, reference=arm != BLIND)
    keep(file, {arm: fine_tuned(part, arm, rate, learned, held_out, folder, given)})
    return True


def fit(part: Part, judgements: list[Judgement], folder: Path) -> bool:
    """Fit the rulers on a part and keep the outcomes; False where that is done already."""
    file = folder / f"rulers-{part.name}.npz"
    if file.is_file():
        return False
    learned = groups_of(lesson(judgements, part), reference=True, split="train")
    fitted = fit_rulers(compare(read_rows(learned)), RULERS, seed=part.seed)
    held_out = measured(judgements, part.fold, reference=True)
    comparisons = compare(read_rows(groups_of(held_out, reference=True, split="eval")))
    outcomes = {name: ruler(comparisons.items) for name, ruler in fitted.items()}
    keep(file, {name: comparisons.outcomes(scores) for name, scores in outcomes.items()})
    return True


def keep(file: Path, outcomes: dict[str, np.ndarray]) -> None:
    """Write outcomes whole or not at all."""
    draft = file.with_name("draft.npz")
    np.savez(draft, **outcomes)
    draft.replace(file)


def results(judgements: list[Judgement], folder: Path) -> list[dict[str, Any]]:
    """A row for each size and scorer whose parts are all there, on judgements with a reference.

    The arm without reference has a second row for those without one.
    """
    rows = []
    for size in SIZES:
        outcomes, others = _gathered(judgements, folder, size)
        for name, values in outcomes.items():
            rows.append({"size": size or "all", "scorer": name, "on": "with a reference"})
            rows[-1] |= _macro(judgements, {name: values}, name, None)
            if name == FULL and PLAIN in outcomes:
                lead = _macro(judgements, outcomes, FULL, PLAIN)
                rows[-1]["lead"] = {k: lead[k] for k in ("value", "low", "high")}
        if others is not None:
            rows.append({"size": size or "all", "scorer": BLIND, "on": "without a reference"})
            rows[-1] |= _macro(judgements, {BLIND: others}, BLIND, None)
    return rows


def _gathered(
    judgements: list[Judgement], folder: Path, size: int | None
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Per scorer the outcome of each judgement, NaN where it has none, averaged over seeds."""
    with_reference = np.array([j.reference is not None for j in judgements])
    folds = np.array([j.fold for j in judgements])
    outcomes, others = {}, None
    for arm in (*ARMS, "rulers"):
        sums: dict[str, np.ndarray] = {}
        for seed in SEEDS:
            for fold in range(FOLDS):
                part = Part(size, seed, fold)
                file = folder / f"{arm.replace(' ', '_')}-{part.name}.npz"
                if not file.is_file():
                    break
                rows = folds == fold
                if arm != BLIND:
                    rows &= with_reference
                with np.load(file) as found:
                    for name in found:
                        values = sums.setdefault(name, np.full(len(judgements), 0.0))
                        values[rows] += found[name] / len(SEEDS)
            else:
                continue
            break
        else:
            for name, values in sums.items():
                outcomes[name] = np.where(with_reference, values, np.nan)
                if arm == BLIND:
                    others = np.where(with_reference, np.nan, values)
    return outcomes, others


def _macro(
    judgements: list[Judgement], outcomes: dict[str, np.ndarray], name: str, less: str | None
) -> dict[str, Any]:
    """Mean over sources of a scorer (less another), with a 95 % interval over prompt groups."""
    values = outcomes[name] - (outcomes[less] if less else 0.0)
    known = ~np.isnan(values)
    sources, source = np.unique([j.source for j in judgements], return_inverse=True)
    source = source[known]
    present = np.flatnonzero(np.bincount(source, minlength=len(sources)) >= FEW)
    groups, group = np.unique([j.prompt_group for j in judgements], return_inverse=True)
    group, values = group[known], values[known]

    def macro(weights: np.ndarray) -> float:
        total = np.bincount(source, weights * values, len(sources))[present]
        size = np.bincount(source, weights, len(sources))[present]
        return float(np.mean(total[size > 0] / size[size > 0]))

    rng = np.random.default_rng(0)
    drawn = [
        macro(
            np.bincount(rng.integers(len(groups), size=len(groups)), minlength=len(groups))[group]
        )
        for _ in range(1000)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    by_source = {
        str(sources[s]): round(float(values[source == s].mean()), 4) for s in present.tolist()
    }
    return {
        "value": round(macro(np.ones(len(values))), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "n": int(known.sum()),
        "sources": by_source,
    }


if __name__ == "__main__":
    main()
