"""What is pre-training worth on real preferences?

    make bench-pretraining-value                            # or, with choices of one's own:
    python -m benchmarks.pretraining_value [--pretrained FOLDER] [--start FOLDER] [--minutes 600]
        [--processes 2]

Three arms are fine-tuned on the same judgements and measured on the same others: from the
pre-trained checkpoint of `bench-real-pool`, from random weights of the same shape (all that this
checkpoint knows it has from the pool's answers), and from those without a reference. Five folds by
prompt group, 50, 200 or all judgements to learn from, three seeds; with none, the pre-trained
checkpoint is measured as it is. Rulers are fitted on the same judgements. Accuracy is the mean over
sources, so a large source does not outweigh a small one; intervals resample prompt groups. Each arm
has the rate, of four, at which three lessons as large taught it most about others, which are left
out of the results; of all judgements, the rate for 200.

Every fine-tuning leaves its outcomes in POLAR_HOME/pretraining-value and is not made again: stop it
whenever you like. A process has one thread, which is faster than one process with all of them.
Judgements that rank answers beside one reference are one group, in which it is read once. The last
line is JSON; the table is in `report.html` there, beside the paper's.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from assets.home import PROJECT, polar_home
from benchmarks.pretraining_value_arms import (
    EPOCHS,
    LIMITS,
    MADE,
    PROMPT,
    STEPS,
    Part,
    fine_tuned,
    fitted,
    shown,
)
from benchmarks.pretraining_value_items import FOLDS, Judgement, read_judgements
from benchmarks.pretraining_value_report import BLIND, FULL, PLAIN, write_value_report
from benchmarks.real_pool_recipe import PHASES

ARMS = (FULL, PLAIN, BLIND)
FITTED = "rulers"
SIZES: tuple[int | None, ...] = (0, 50, 200, None)  # None: all
SEEDS = (0, 1, 2)
RATES = (1e-5, 3e-5, 1e-4, 5e-4)
TRIALS: dict[int | None, int] = {50: 50, 200: 200, None: 200}
"""Judgements to learn from when a size's rate is chosen; with all a trial would take too long."""
TRIED = 500
"""Judgements that a rate is chosen on."""
FEW = 20
"""A source with fewer judgements of a kind does not count in the mean over sources."""


Rates = Mapping[tuple[str, int], float]
"""Of an arm, by the number of judgements that it was tried on."""


def main() -> None:
    given = parser().parse_args()
    judgements, counts = read_judgements(given.data)
    print(dict(sorted(counts.items())), file=sys.stderr)
    home = polar_home() / "pretraining-value"
    given.start = given.start or untrained(given.pretrained, home / "untrained")
    folder = home / identity(given.pretrained, given.start)
    folder.mkdir(parents=True, exist_ok=True)
    workers = joblib.Parallel(
        given.processes, return_as="generator_unordered", pre_dispatch=given.processes
    )
    choose = joblib.delayed(functools.partial(rate_of, folder=folder, given=given))
    tried = [(arm, trial) for trial in sorted(set(TRIALS.values())) for arm in ARMS]
    rates = dict(workers(choose(*each) for each in tried))
    left = [each for each in all_work() if not kept(folder, *each, rates).is_file()]
    make = joblib.delayed(functools.partial(run, rates=rates, folder=folder, given=given))
    began, cost = time.monotonic(), functools.partial(forward_passes, len(judgements))
    done, whole = 0.0, sum(map(cost, left))
    for part, scorer in workers(make(*each) for each in until(given.minutes, left)):
        done += cost((part, scorer))
        rest = (time.monotonic() - began) / 60 * (whole / done - 1)
        print(f"{scorer}, {part.name}: done; {rest:.0f} min left", file=sys.stderr, flush=True)
    found = results(judgements, folder, rates)
    paths = write_value_report(folder, found)
    print(paths["md"].read_text(encoding="utf-8"))
    chosen = {arm: {trial: rates[arm, trial] for trial in TRIALS.values()} for arm in ARMS}
    print(json.dumps({"folder": str(folder), "counts": counts, "rates": chosen, "rows": found}))


def parser() -> argparse.ArgumentParser:
    home = polar_home() / "real-pool"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared/data/open")
    parser.add_argument("--pretrained", type=Path, default=home / PHASES[-1].name)
    parser.add_argument("--start", type=Path, help="weights of the arms that are not pre-trained")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    return parser


def untrained(pretrained: Path, out: Path) -> Path:
    """Write random weights of a checkpoint's shape, with its tokenizer."""
    torch.manual_seed(0)
    network = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(pretrained))
    network.save_pretrained(out)
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(out)
    return out


def identity(*folders: Path) -> str:
    """A short hash of the weights that the arms start from, and of how they are fine-tuned.

    The rate is not in it: what was learned at a rate stays valid when others are tried.
    """
    total = hashlib.blake2b(
        repr((MADE, EPOCHS, STEPS, LIMITS, PROMPT, TRIED)).encode(), digest_size=6
    )
    for folder in folders:
        total.update((folder / "model.safetensors").read_bytes())
    return total.hexdigest()


def all_work() -> Iterator[tuple[Part, str]]:
    """Small sets first, and every fold of a seed before the next seed."""
    for size in SIZES:
        for seed in seeds_of(size):
            for fold in range(FOLDS):
                for scorer in (FITTED, *ARMS) if size != 0 else (FULL,):
                    yield Part(size, seed, fold), scorer


def seeds_of(size: int | None) -> tuple[int, ...]:
    """Where nothing is learned there is nothing to draw."""
    return SEEDS if size != 0 else SEEDS[:1]


def forward_passes(total: int, work: tuple[Part, str]) -> float:
    """Roughly what a part costs, in judgements that are read once; learning reads them thrice."""
    part, scorer = work
    learned = total * (FOLDS - 1) / FOLDS if part.size is None else part.size
    read = 0.0 if scorer == FITTED else 3 * learned * EPOCHS.get(part.size, 0)
    return read + total / FOLDS


def until(minutes: float, work: Iterable[tuple[Part, str]]) -> Iterator[tuple[Part, str]]:
    """Work as long as there is time."""
    end = time.monotonic() + 60 * minutes
    for each in work:
        if time.monotonic() > end:
            print(f"{minutes:g} minutes are over; the same command goes on", file=sys.stderr)
            return
        yield each


def kept(folder: Path, part: Part, scorer: str, rates: Rates) -> Path:
    """Where the outcomes of an arm at its rate, or of all rulers, are."""
    at = f"{rates[scorer, TRIALS[part.size]]:g}-" if learns(part, scorer) else ""
    return folder / f"{scorer.replace(' ', '_')}-{at}{part.name}.npz"


def learns(part: Part, scorer: str) -> bool:
    """Whether a part has a rate: rulers have none, nor has an arm that learns nothing."""
    return scorer in ARMS and part.size != 0


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


def chosen_on(judgements: list[Judgement]) -> list[Judgement]:
    """The judgements that every rate is chosen on, and that are no result of it."""
    return shuffled(judgements, Part(None, SEEDS[0], 0))[:TRIED]


def trial_lesson(judgements: list[Judgement], part: Part) -> list[Judgement]:
    """What a trial learns from: no prompt group that its rate is chosen on."""
    groups = {j.prompt_group for j in chosen_on(judgements)}
    learned = [j for j in shuffled(judgements, part) if j.prompt_group not in groups][: part.size]
    if len(learned) < (part.size or 0):
        sys.exit(f"too few judgements: {TRIED} to choose rates on and {part.size} to learn from")
    return learned


def rate_of(
    arm: str, trial: int, *, folder: Path, given: argparse.Namespace
) -> tuple[tuple[str, int], float]:
    """An arm's best rate over the lessons of all seeds; what each lesson did is kept."""
    judgements, _ = read_judgements(given.data)
    others = chosen_on(judgements)
    file = folder / f"trials-{arm.replace(' ', '_')}-{trial}.json"
    tried: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    means = {}
    for rate in RATES:
        names = {f"rate {rate:g}, seed {seed}": Part(trial, seed, 0) for seed in SEEDS}
        known = tried.keys() >= names.keys()
        for name, part in names.items():
            if name not in tried:
                learned = trial_lesson(judgements, part)
                outcomes = fine_tuned(part, arm, rate, learned, others, folder, given)
                tried[name] = _macro(others, {arm: outcomes}, arm, None)["value"]
                file.write_text(json.dumps(tried))
        means[rate] = float(np.mean([tried[name] for name in names]))
        if not known:
            said = f"{arm}, {trial} judgements, rate {rate:g}: {means[rate]:.3f}"
            print(said, file=sys.stderr, flush=True)
    return (arm, trial), max(RATES, key=means.__getitem__)


def run(
    part: Part, scorer: str, *, rates: Rates, folder: Path, given: argparse.Namespace
) -> tuple[Part, str]:
    """Fine-tune an arm on a part, or fit the rulers, and keep the outcomes."""
    judgements, _ = read_judgements(given.data)
    learned = lesson(judgements, part)
    held_out = measured(judgements, part.fold, reference=scorer != BLIND)
    if scorer == FITTED:
        outcomes = fitted(part, learned, held_out)
    else:
        rate = rates[scorer, TRIALS[part.size]] if learns(part, scorer) else 0.0
        outcomes = {scorer: fine_tuned(part, scorer, rate, learned, held_out, folder, given)}
    keep(kept(folder, part, scorer, rates), outcomes)
    return part, scorer


def keep(file: Path, outcomes: dict[str, np.ndarray]) -> None:
    """Write outcomes whole or not at all."""
    draft = file.with_suffix(".draft.npz")
    np.savez(draft, **outcomes)
    draft.replace(file)


def results(judgements: list[Judgement], folder: Path, rates: Rates) -> list[dict[str, Any]]:
    """A row for each size and scorer whose parts are all there, on judgements with a reference.

    Left out are those that a rate was chosen on. The arm without reference has a second row for
    those without one.
    """
    rows = []
    for size in SIZES:
        outcomes, others = _gathered(judgements, folder, size, rates)
        for name, values in outcomes.items():
            rows.append({"size": shown(size), "scorer": name, "on": "with a reference"})
            rows[-1] |= _macro(judgements, {name: values}, name, None)
            if name == FULL and PLAIN in outcomes:
                lead = _macro(judgements, outcomes, FULL, PLAIN)
                rows[-1]["lead"] = {k: lead[k] for k in ("value", "low", "high")}
        if others is not None:
            rows.append({"size": shown(size), "scorer": BLIND, "on": "without a reference"})
            rows[-1] |= _macro(judgements, {BLIND: others}, BLIND, None)
    return rows


def _gathered(
    judgements: list[Judgement], folder: Path, size: int | None, rates: Rates
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Per scorer the outcome of each judgement, NaN where it has none, averaged over seeds."""
    with_reference = np.array([j.reference is not None for j in judgements])
    tuned = set(chosen_on(judgements))
    fresh = with_reference & np.array([j not in tuned for j in judgements])
    folds = np.array([j.fold for j in judgements])
    outcomes, others = {}, None
    for arm in (*ARMS, FITTED):
        sums: dict[str, np.ndarray] = {}
        for seed in seeds_of(size):
            for fold in range(FOLDS):
                file = kept(folder, Part(size, seed, fold), arm, rates)
                if not file.is_file():
                    break
                rows = folds == fold
                if arm != BLIND:
                    rows &= with_reference
                with np.load(file) as found:
                    for name in found:
                        values = sums.setdefault(name, np.full(len(judgements), 0.0))
                        values[rows] += found[name] / len(seeds_of(size))
            else:
                continue
            break
        else:
            for name, values in sums.items():
                outcomes[name] = np.where(fresh, values, np.nan)
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
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from here.")
