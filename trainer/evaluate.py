"""Evaluation: a model and its rulers on the same comparisons, each number with its interval.

Suites: `policy_discrimination` (groups of the pre-training wrapper: does the reference's own policy
score above others, per cell, siblings apart) and `preference` (groups of the SFT wrapper: does the
better answer score higher, per category and cell). A scorer is any function from items to numbers,
so no torch here. How rulers are made is in `rulers`, intervals in `intervals`, prose and plots in
`report`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, field_validator

from trainer import intervals, rulers
from trainer.comparisons import (
    UNKNOWN,
    Comparisons,
    Group,
    choose,
    compare,
    shuffle_references,
)
from trainer.errors import TrainerError
from trainer.rulers import BLIND, RULERS, SHUFFLED, Score

DISCRIMINATION = "policy_discrimination"
PREFERENCE = "preference"
SUITES = {DISCRIMINATION: "pretrain", PREFERENCE: "sft"}  # suite: wrapper of its groups
CELLS = ("seen", "new_policy", "new_prompt", "both_new")
ALL = "all"
SIBLINGS = "siblings"
MODEL = "model"

EVALUATION_SCHEMA = pa.schema(
    [
        pa.field("suite", pa.string(), nullable=False),
        pa.field("cell", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("scorer", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("clusters", pa.int64(), nullable=False),
        pa.field("interval", pa.string(), nullable=False),
    ]
)
"""Rows of an evaluation: the lake's `evaluations` without the ids. `metric` is `accuracy`, or
`difference`: the first model less `scorer`, paired. `interval` says what was resampled."""

Progress = Callable[[int, int, str], None]
_SLICE = 512  # items scored between two progress reports
_SURE = 20  # comparisons from which being right in every one is no chance (one in a million)


class EvaluationSettings(BaseModel):
    """What is evaluated, and how closely; intervals are at 95 %."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rulers: tuple[str, ...] = RULERS
    shuffled_reference: bool = True
    max_train_groups: int = Field(default=3000, ge=1)
    max_eval_groups: int = Field(default=2000, ge=1)
    resamples: int = Field(default=1000, ge=100)
    seed: int = 0

    @field_validator("rulers")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(names) - set(RULERS))
        if unknown:
            msg = f"unknown rulers {', '.join(unknown)}; there are {', '.join(RULERS)}"
            raise ValueError(msg)
        return names


def evaluate(
    score: Score | Mapping[str, Score],
    eval_groups: pa.Table,
    train_groups: pa.Table,
    settings: EvaluationSettings | None = None,
    progress: Progress | None = None,
    suites: Sequence[str] = tuple(SUITES),
) -> pa.Table:
    """Score every suite with the models and the rulers.

    Args:
        score: one model, or several by name; the first is the one that differences are taken from
            and that is asked with shuffled references.
        eval_groups: groups; only those of split `eval` are used. `max_eval_groups` bounds them per
            suite and cell.
        train_groups: groups that rulers are fitted on; only those of split `train` are used.
        settings: bounds, seed, rulers.
        suites: which to measure.
        progress: called with items scored, items in all, and what is being scored.

    Returns:
        Rows of `EVALUATION_SCHEMA`. The schema's metadata carries remarks: see `notes_of`.

    Raises:
        TrainerError: a groups table lacks a column, or a scorer gives a score that is not finite,
            or not one score an item.
    """
    settings = settings or EvaluationSettings()
    models = dict(score) if isinstance(score, Mapping) else {MODEL: score}
    chosen = {suite: _choose(eval_groups, suite, "eval", settings) for suite in suites}
    notes = [remark for _, remarks in chosen.values() for remark in remarks]
    passes = len(models) + settings.shuffled_reference
    total = passes * sum(len(r["candidates"]) for rows, _ in chosen.values() for r in rows)
    report = _Counter(progress, total)
    table: list[dict[str, Any]] = []
    for suite, (rows, _) in chosen.items():
        comparisons = compare(rows)
        if not len(comparisons):
            notes.append(f"{suite}: no groups of split eval, so nothing was measured.")
            continue
        outcomes = {
            name: comparisons.outcomes(scored(model, comparisons.items, name, report))
            for name, model in models.items()
        }
        if settings.shuffled_reference:
            references, kept = shuffle_references(rows, settings.seed)
            notes.append(
                f"{suite}: {SHUFFLED} took the reference from the same prompt for {kept:,} of "
                f"{len(rows):,} groups, from another prompt for the rest."
            )
            shuffled = compare(rows, references)
            model = next(iter(models.values()))
            outcomes[SHUFFLED] = shuffled.outcomes(scored(model, shuffled.items, SHUFFLED, report))
        training_rows, remarks = _choose(train_groups, suite, "train", settings)
        training = compare(training_rows)
        notes += remarks
        report.say(f"{suite}: fitting rulers on {len(training_rows):,} groups")
        fitted = rulers.fit_rulers(training, settings.rulers, settings.seed)
        left_out = [name for name in settings.rulers if name not in fitted]
        if left_out:
            notes.append(f"{suite}: no training groups, so without {', '.join(left_out)}.")
        for name, ruler in fitted.items():
            outcomes[name] = comparisons.outcomes(ruler(comparisons.items))
        for cell, category, mask in strata(comparisons, suite):
            table += _measure(suite, cell, category, mask, comparisons, outcomes, settings)
    return with_notes(pa.Table.from_pylist(table, EVALUATION_SCHEMA), notes)


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Several results of `evaluate` as one, with the remarks of all."""
    rows = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
    return with_notes(rows, [note for table in tables for note in notes_of(table)])


def with_notes(rows: pa.Table, notes: list[str]) -> pa.Table:
    """The same rows with these remarks."""
    return rows.replace_schema_metadata({"notes": json.dumps(notes)})


def notes_of(rows: pa.Table) -> list[str]:
    """What `evaluate` has to say beyond its rows: empty suites, samples taken, rulers left out."""
    return json.loads((rows.schema.metadata or {}).get(b"notes", b"[]"))


def scored(
    score: Score, items: list[dict[str, Any]], name: str, report: _Counter | None = None
) -> np.ndarray:
    """Scores of all items (n,), asked for in slices so that progress can be told.

    Raises:
        TrainerError: the scorer gives another number of scores, or one that is not finite.
    """
    parts = [np.empty(0, np.float32)]
    for start in range(0, len(items), _SLICE):
        part = items[start : start + _SLICE]
        scores = np.asarray(score(part), np.float32).reshape(-1)
        if len(scores) != len(part):
            msg = f"scorer {name!r} gave {len(scores)} scores for {len(part)} items, not one each"
            raise TrainerError(msg)
        if not np.isfinite(scores).all():
            at = start + int(np.flatnonzero(~np.isfinite(scores))[0])
            msg = (
                f"scorer {name!r} gave {scores[at - start]} for item {at}; a checkpoint with "
                "weights that are not finite cannot be evaluated, train it again"
            )
            raise TrainerError(msg)
        parts.append(scores)
        if report:
            report.add(len(part), f"scoring with {name}")
    return np.concatenate(parts)


def strata(comparisons: Comparisons, suite: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """What gets rows of its own: cell, category and which comparisons they hold (n,) bool."""
    siblings = comparisons.sibling if suite == DISCRIMINATION else np.zeros(len(comparisons), bool)
    cells = [c for c in CELLS if (comparisons.cell == c).any()]
    cells += sorted(set(comparisons.cell.tolist()) - {*CELLS, UNKNOWN})
    for cell in (*cells, ALL):
        inside = (comparisons.cell == cell) | (cell == ALL)
        for category, mask in ((ALL, inside & ~siblings), (SIBLINGS, inside & siblings)):
            if mask.any():
                yield cell, category, mask
    if suite == PREFERENCE:
        for category in sorted(set(comparisons.category.tolist())):
            yield ALL, category, comparisons.category == category


def reference_blind_check(
    train: pa.Table | Path, evaluation: pa.Table | Path, settings: EvaluationSettings | None = None
) -> list[dict[str, Any]]:
    """What a ruler that sees no reference reaches on policy discrimination, per split and cell.

    It must be at 0.50: above it, candidates give the label away. On the training split it is fitted
    on one half of the prompt groups and measured on the other, both ways round; on the evaluation
    split it is fitted on all training groups. Siblings count like all others here.

    Args:
        train: groups, or a file of them; those of split `train` are used.
        evaluation: groups, or a file of them; those of split `eval` are used.
        settings: bounds, seed and resamples.

    Returns:
        Rows with split, cell, value, low, high, n, clusters, interval, and `leaks`: whether the
        whole interval lies above 0.50, or all of many comparisons are right. A value under it is
        no leak: where each policy wins exactly as often as it loses, what is left over for one part
        is missing in the other.
    """
    settings = settings or EvaluationSettings()
    sides = {}
    for split, source in (("train", train), ("eval", evaluation)):
        table = _read(source) if isinstance(source, Path) else source
        sides[split] = compare(_choose(table, DISCRIMINATION, split, settings)[0])
    training, held_out = sides["train"], sides["eval"]
    if not len(training):
        msg = (
            "the reference-blind check needs training groups of wrapper 'pretrain'; there are none"
        )
        raise TrainerError(msg)
    rows = []
    folds = _halves(training, settings.seed)
    outcomes = np.full(len(training), 0.5)
    for fold in (0, 1):
        seen = training.only(folds != fold)
        if len(seen):
            ruler = rulers.fit_reference_blind(seen)
            outcomes[folds == fold] = training.outcomes(ruler(training.items))[folds == fold]
    for cell in sorted(set(training.cell.tolist())):
        rows.append(_blind_row("train", cell, training.cell == cell, training, outcomes, settings))
    if len(held_out):
        outcomes = held_out.outcomes(rulers.fit_reference_blind(training)(held_out.items))
        cells = [c for c in (*CELLS, UNKNOWN) if (held_out.cell == c).any()]
        rows += [
            _blind_row("eval", cell, held_out.cell == cell, held_out, outcomes, settings)
            for cell in cells
        ]
    return rows


def _halves(comparisons: Comparisons, seed: int) -> np.ndarray:
    """0 or 1 for each comparison, the same for all of one prompt group (n,)."""
    codes = np.unique(comparisons.prompt, return_inverse=True)[1].reshape(-1)
    order = np.random.default_rng(seed).permutation(codes.max() + 1)
    return order[codes] % 2


def _blind_row(
    split: str,
    cell: str,
    mask: np.ndarray,
    comparisons: Comparisons,
    outcomes: np.ndarray,
    settings: EvaluationSettings,
) -> dict[str, Any]:
    row = _measure(DISCRIMINATION, cell, ALL, mask, comparisons, {BLIND: outcomes}, settings)[0]
    kept = ("cell", "value", "low", "high", "n", "clusters", "interval")
    always = row["value"] == 1 and row["n"] >= _SURE  # an interval of few clusters is wide then
    leaks = row["low"] > 0.5 or always
    return {"split": split} | {name: row[name] for name in kept} | {"leaks": leaks}


def _measure(
    suite: str,
    cell: str,
    category: str,
    mask: np.ndarray,
    comparisons: Comparisons,
    outcomes: Mapping[str, np.ndarray],
    settings: EvaluationSettings,
) -> list[dict[str, Any]]:
    """The rows of one stratum: every scorer's accuracy, and the first one's lead over each."""
    resampled = intervals.resample(
        np.stack([values[mask] for values in outcomes.values()], axis=1),
        comparisons.prompt[mask],
        comparisons.policy[mask],
        resamples=settings.resamples,
        seed=settings.seed,
    )
    found = [("accuracy", s, resampled.mean(i)) for i, s in enumerate(outcomes)]
    found += [
        ("difference", s, resampled.difference(0, i)) for i, s in enumerate(outcomes) if i > 0
    ]
    return [
        {
            "suite": suite,
            "cell": cell,
            "category": category,
            "metric": metric,
            "scorer": scorer,
            "value": interval.value,
            "low": interval.low,
            "high": interval.high,
            "n": interval.n,
            "clusters": interval.clusters,
            "interval": interval.method,
        }
        for metric, scorer, interval in found
    ]


def _choose(
    groups: pa.Table, suite: str, split: str, settings: EvaluationSettings
) -> tuple[list[Group], list[str]]:
    """A suite's groups of one split, at most as many as the settings allow, and remarks."""
    train = split == "train"
    limit = settings.max_train_groups if train else settings.max_eval_groups
    chosen, remarks = choose(
        groups, SUITES[suite], split, limit, by_cell=not train, seed=settings.seed
    )
    return chosen, [f"{suite}: {remark}" for remark in remarks]


class _Counter:
    """Progress over all passes: what is done so far, told with every slice."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, items: int, note: str) -> None:
        self.done += items
        self.say(note)

    def say(self, note: str) -> None:
        if self.progress:
            self.progress(self.done, self.total, note)


def _read(path: Path) -> pa.Table:
    from trainer.data import read_groups

    return read_groups([path])
