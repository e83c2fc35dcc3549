"""Does a reward model from scratch tell real policies apart better than rulers do?

    make bench-real-pool                                        # or, with choices of one's own:
    python -m benchmarks.real_pool [--data FOLDER] [--minutes 4] [--threads 2] [--only-rulers]

The task and its sides are in `real_pool_task`, the recipe in `real_pool_recipe`. Every step leaves
its result in POLAR_HOME/real-pool and is not made again; training goes on where it was stopped, and
its minutes are those of the processor, so other work on the machine takes none of them away.
Scores come from the saved checkpoint through `polar score`. The last line is JSON: the checkpoint
and, per cell, accuracy with its clustered 95 % interval, every ruler, and the paired difference
from the best one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assets.home import PROJECT, polar_home
from benchmarks import real_pool_recipe as recipe
from benchmarks.real_pool_task import CELLS, SOURCE, Pool, draw, groups_table, read_pool
from trainer.comparisons import Comparisons, compare, read_rows
from trainer.evaluate import MODEL
from trainer.intervals import Interval, resample
from trainer.rulers import BLIND, RULERS, fit_rulers

GROUPS = 1500
"""Groups per cell."""
RULER_GROUPS = 3000
SEED, RULER_SEED = 1, 2
RESAMPLES = 1000


def main() -> None:
    given = parser().parse_args()
    folder = polar_home() / "real-pool"
    folder.mkdir(parents=True, exist_ok=True)
    task = Task(given.data, folder)
    rulers = measured_rulers(task)
    if given.only_rulers:
        found = {c: summary(compare(read_rows(task.cell(c))), rulers[c]) for c in CELLS}
        print(json.dumps({"cells": found}))
        return
    checkpoint = recipe.make(
        task, folder, minutes=given.minutes, threads=given.threads, groups=given.groups
    )
    found = {}
    for cell in CELLS:
        comparisons = compare(read_rows(task.cell(cell)))
        outcomes = comparisons.outcomes(scores(checkpoint, comparisons, folder, cell))
        found[cell] = summary(comparisons, {MODEL: outcomes, **rulers[cell]})
        print(said(cell, found[cell]), flush=True)
    print(json.dumps({"checkpoint": str(checkpoint), "cells": found}))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared/data/open")
    parser.add_argument("--minutes", type=float, default=4, help="of each thread, for training")
    parser.add_argument("--groups", type=int, default=4_000, help="drawn for each phase")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only-rulers", action="store_true", help="no training")
    return parser


class Task:
    """The groups of the evaluation, kept as files, and the pool that training draws from."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder
        self._pool: Pool | None = None
        files = [folder / f"eval-{cell}.parquet" for cell in CELLS]
        if not all(file.is_file() for file in [*files, folder / "rulers.parquet"]):
            for cell, file in zip(CELLS, files, strict=True):
                drawn = draw(self.pool, cell, GROUPS, seed=SEED)
                pq.write_table(groups_table(self.pool, drawn, cell, "eval"), file)
            drawn = draw(self.pool, "seen", RULER_GROUPS, seed=RULER_SEED, without=self.kept_apart)
            rows = groups_table(self.pool, drawn, "seen", "train")
            pq.write_table(rows, folder / "rulers.parquet")
            counts = {name: n for name, n in sorted(self.pool.counts.items())}
            print(f"{SOURCE}: {counts}", file=sys.stderr)

    @property
    def pool(self) -> Pool:
        """The answers, read when they are first asked for."""
        if self._pool is None:
            self._pool = read_pool(self.data)
        return self._pool

    @property
    def kept_apart(self) -> set[frozenset[int]]:
        """Pairs of reference and positive of the cell `seen`, which training must not draw."""
        return {frozenset(answers[:2]) for answers in draw(self.pool, "seen", GROUPS, seed=SEED)}

    def cell(self, cell: str) -> pa.Table:
        """The groups that are evaluated."""
        return pq.read_table(self.folder / f"eval-{cell}.parquet")


def measured_rulers(task: Task) -> dict[str, dict[str, np.ndarray]]:
    """Per cell and ruler the outcome of every comparison: 1 right, 0 wrong, 0.5 a tie."""
    file = task.folder / "rulers.npz"
    if not file.is_file():
        training = compare(read_rows(pq.read_table(task.folder / "rulers.parquet")))
        fitted = fit_rulers(training, seed=SEED)
        outcomes = {}
        for cell in CELLS:
            comparisons = compare(read_rows(task.cell(cell)))
            for name, ruler in fitted.items():
                outcomes[f"{cell}/{name}"] = comparisons.outcomes(ruler(comparisons.items))
        draft = file.with_name("rulers.draft.npz")
        np.savez_compressed(draft, **outcomes)
        draft.replace(file)
    with np.load(file) as kept:
        return {cell: {name: kept[f"{cell}/{name}"] for name in RULERS} for cell in CELLS}


def scores(checkpoint: Path, comparisons: Comparisons, folder: Path, cell: str) -> np.ndarray:
    """Scores of all candidates, in order, as `polar score` prints them."""
    out = folder / f"scores-{checkpoint.name}-{cell}.txt"
    if not out.is_file():
        items = folder / f"items-{cell}.jsonl"
        items.write_text("".join(json.dumps(item) + "\n" for item in comparisons.items))
        polar = Path(sys.executable).with_name("polar")
        command = [str(polar), "score", str(checkpoint), "--input", str(items)]
        print(f"$ {' '.join(command)}", file=sys.stderr, flush=True)
        draft = out.with_suffix(".draft")
        with draft.open("w") as sink:
            subprocess.run(command, stdout=sink, check=True, cwd=PROJECT)
        items.unlink()
        draft.replace(out)
    return np.loadtxt(out, dtype=np.float32)


def summary(comparisons: Comparisons, outcomes: dict[str, np.ndarray]) -> dict[str, Any]:
    """What one cell says: every ruler, and the model with its lead over the best of them."""
    names = list(outcomes)
    resampled = resample(
        np.stack(list(outcomes.values()), axis=1),
        comparisons.prompt,
        comparisons.policy,
        resamples=RESAMPLES,
        seed=SEED,
    )
    rows = {
        name: {
            "accuracy": round(float(resampled.means[i]), 4),
            "interval": _ends(resampled.mean(i)),
        }
        for i, name in enumerate(names)
    }
    model = rows.pop(MODEL, {})
    best = max((n for n in rows if n != BLIND), key=lambda name: rows[name]["accuracy"])
    found = {**model, "n": len(comparisons), "rulers": rows, "best_ruler": best}
    if model:
        lead = resampled.difference(names.index(MODEL), names.index(best))
        found |= {"lead": round(lead.value, 4), "lead_interval": _ends(lead)}
    return found


def _ends(interval: Interval) -> list[float]:
    return [round(interval.low, 4), round(interval.high, 4)]


def said(cell: str, row: dict[str, Any]) -> str:
    """One cell in a line."""
    low, high = row["interval"]
    rulers = ", ".join(f"{name} {r['accuracy']:.3f}" for name, r in row["rulers"].items())
    below, above = row["lead_interval"]
    return (
        f"{cell}: {row['accuracy']:.3f} [{low:.3f}, {high:.3f}], n = {row['n']}; {rulers}; "
        f"ahead of {row['best_ruler']} by {row['lead']:+.3f} [{below:+.3f}, {above:+.3f}]"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from here.")
