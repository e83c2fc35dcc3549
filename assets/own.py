"""`polar finetune` and `polar evaluate`: the trainer's functions with bars and tables around them.

No Dagster and no lake here; what is computed belongs to `trainer`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from assets.home import polar_home
from trainer.console import print_evaluation, shown
from trainer.errors import BadGroupsError
from trainer.own import Change, finetune_own

MOST_ROWS = 50
"""Rows that are printed one by one; more are summed up."""


def finetune_command(
    checkpoint: Path,
    data: Path,
    out: Path,
    config: Path | None,
    words: Sequence[str],
    recipe: str | None,
    *,
    as_json: bool,
) -> None:
    """Fine-tune, then print what it did to the scores of the rows it was trained on."""
    try:
        with shown() as progress:
            summary, change = finetune_own(
                checkpoint, data, out, config=config, words=words, recipe=recipe, progress=progress
            )
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. The same command goes on from here.")
        raise typer.Exit(130) from None
    if as_json:
        kept = {key: value for key, value in summary.items() if key != "curve"}
        print(json.dumps({"out": str(out), **kept, **change.summary(), "rows": change.rows()}))
        return
    _print_change(Console(), change)
    left_out = {
        reason: count
        for reason, count in summary["counts"].items()
        if count and reason not in ("read", "kept")
    }
    for reason, count in left_out.items():
        print(f"left out: {count} rows ({reason})")
    print(
        f"{out}: {summary['steps']} steps over {summary['groups']} rows "
        f"({summary['epochs']:.0f} epochs) in {summary['seconds']:.0f} s"
    )


def _print_change(console: Console, change: Change) -> None:
    rows = change.rows()
    if len(rows) <= MOST_ROWS:
        table = Table("row", title="Scores before and after")
        for heading in ("chosen", "rejected", "margin", "-> chosen", "-> rejected", "-> margin"):
            table.add_column(heading, justify="right")
        for number, row in enumerate(rows, start=1):
            cells = []
            for name in ("before", "after"):
                chosen, rejected = row[f"{name}_chosen"], row[f"{name}_rejected"]
                cells += [f"{value:.2f}" for value in (chosen, rejected, chosen - rejected)]
            table.add_row(str(number), *cells)
        console.print(table)
    found = change.summary()
    before, after = found["before"], found["after"]
    print(
        f"the better answer scored higher in {before['accuracy']:.0%} of {found['comparisons']} "
        f"comparisons before, {after['accuracy']:.0%} after; "
        f"mean margin {before['margin']:.2f} before, {after['margin']:.2f} after"
    )
    print("these rows were trained on: `polar evaluate` on others says what was learned")


def evaluate_command(
    checkpoint: Path,
    suites: Sequence[str] | None,
    data: Path | None,
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Evaluate and print one line a number: the model, and its rulers beside it."""
    from trainer.evaluate_files import evaluate_command as evaluate
    from trainer.model import read_record

    read_record(checkpoint)
    files = groups_files(data or _home_groups(checkpoint))
    with shown() as progress:
        rows = evaluate([checkpoint], files, None, out, suites=suites, progress=progress)
    print_evaluation(rows, as_json=as_json)


def groups_files(data: Path) -> list[Path]:
    """A groups file, or all of a folder.

    Raises:
        BadGroupsError: there is none.
    """
    if data.is_file():
        return [data]
    files = sorted(f for f in data.glob("*") if f.suffix in (".parquet", ".jsonl"))
    if not files:
        msg = f"{data}: no groups file (.parquet or .jsonl) there; give a file or a folder of them"
        raise BadGroupsError(msg)
    return files


def _home_groups(checkpoint: Path) -> Path:
    """The groups of the configuration that a checkpoint belongs to, or of the home's only one."""
    home, folder = polar_home(), checkpoint.resolve().parent
    own = folder.parent.parent / "groups" / folder.name
    known = sorted(path for path in (home / "groups").glob("*") if path.is_dir())
    if own.is_dir():
        return own
    if len(known) == 1:
        return known[0]
    there = ", ".join(map(str, known)) if known else f"{home} has none yet"
    msg = f"which groups {checkpoint} is to be measured on is not clear: give --data ({there})"
    raise BadGroupsError(msg)
