"""Evaluation from files to files: checkpoints and groups in, rows and a report out.

    python -m trainer evaluate CHECKPOINT --groups eval.parquet --train-groups train.parquet

What is measured belongs to `evaluate`, what is said about it to `report`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.errors import TrainerError
from trainer.evaluate import (
    MODEL,
    SUITES,
    EvaluationSettings,
    Progress,
    evaluate,
    notes_of,
    with_notes,
)
from trainer.report import ReportContext, write_report
from trainer.rulers import RULERS, SHUFFLED, Score


def evaluate_command(
    checkpoints: Sequence[Path],
    groups: Sequence[Path],
    train_groups: Sequence[Path] | None = None,
    out: Path | None = None,
    *,
    suites: Sequence[str] | None = None,
    settings: EvaluationSettings | None = None,
    progress: Progress | None = None,
) -> pa.Table:
    """Evaluate checkpoints from files; the first is the model, the others are set against it.

    Args:
        checkpoints: folders of POLAR checkpoints.
        groups: groups files to measure on. Where no row says split `eval`, all rows are measured.
        train_groups: groups files to fit rulers on, else the rows of split `train` in `groups`.
        out: folder for evaluations.parquet, report.html, report.md and report.json, if wanted.
        suites: which to measure, by default both.
        settings: bounds, seed, rulers.
        progress: as in `evaluate`.

    Returns:
        The rows of `evaluate`.

    Raises:
        TrainerError: a suite is unknown, a groups file or a checkpoint cannot be used.
    """
    from trainer.data import read_groups
    from trainer.score import Scorer

    unknown = sorted(set(suites or ()) - set(SUITES))
    if unknown:
        msg = f"suite {unknown[0]!r} is unknown; there are {', '.join(SUITES)}"
        raise TrainerError(msg)
    held_out = read_groups(groups)
    training = read_groups(train_groups) if train_groups else held_out
    notes = []
    if "eval" not in held_out.column("split").to_pylist():
        split = pa.array(["eval"] * held_out.num_rows, pa.string())
        at = held_out.column_names.index("split")
        held_out = held_out.set_column(at, held_out.schema.field(at), split)
        notes.append("No row of the groups says split eval, so all of them were measured.")
        if not train_groups:
            training = held_out.slice(0, 0)
    models: dict[str, Score] = {}
    for index, checkpoint in enumerate(checkpoints):
        name = MODEL if index == 0 else _unused(checkpoint.resolve().name, models)
        models[name] = Scorer.load(checkpoint).score
    rows = evaluate(models, held_out, training, settings, progress, suites or tuple(SUITES))
    rows = with_notes(rows, notes + notes_of(rows))
    if out:
        named = dict(zip(models, checkpoints, strict=True))
        write_report(out, rows, _context(named, groups, train_groups, out))
        pq.write_table(rows, out / "evaluations.parquet")
    return rows


def _unused(name: str, models: Mapping[str, Score]) -> str:
    taken = {*models, *RULERS, SHUFFLED}
    numbered = (f"{name}_{number}" for number in range(2, len(taken) + 3))
    return next(candidate for candidate in (name, *numbered) if candidate not in taken)


def _context(
    checkpoints: Mapping[str, Path],
    groups: Sequence[Path],
    train_groups: Sequence[Path] | None,
    out: Path,
) -> ReportContext:
    """What can be said from files alone: checkpoint records, training curves and the command."""
    from trainer.model import read_record
    from trainer.resume import read_log

    known, curves = [], {}
    for scorer, path in checkpoints.items():
        facts = {"stage", "parents", "snapshot", "checkpoint_id"}
        record = read_record(path).model_dump(mode="json", include=facts)
        known.append({"scorer": scorer, "path": path.name} | record)
        if lines := read_log(path):
            curves[scorer] = lines
    words = ["python", "-m", "trainer", "evaluate", *map(str, checkpoints.values())]
    for option, files in (("--groups", groups), ("--train-groups", train_groups or ())):
        words += [word for file in files for word in (option, str(file))]
    return ReportContext(
        checkpoints=known,
        curves=curves,
        command=shlex.join([*words, "--out", str(out)]),
    )
