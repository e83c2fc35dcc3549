"""What commands show: a bar with the time left on a terminal, lines elsewhere; rows of numbers.

What is counted belongs to the caller; lines for machines to `metrics`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from trainer.packing import Progress as Report

EVERY = 10.0
"""Seconds between two lines where there is no terminal."""


@contextmanager
def shown() -> Iterator[Report]:
    """A callable for `progress` arguments, which writes to standard error."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=console) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, note: bar.update(
                task, completed=done, total=total, description=note
            )
        return
    last, written = time.monotonic(), ""  # what is over at once says nothing

    def line(done: int, total: int, note: str) -> None:
        nonlocal last, written
        text = f"{100 * done // max(total, 1):3d} %  {note}"
        if text != written and (time.monotonic() - last >= EVERY or done == total):
            last, written = time.monotonic(), text
            print(text, file=sys.stderr, flush=True)

    yield line


def print_evaluation(rows: pa.Table, *, as_json: bool) -> None:
    """Print the rows of an evaluation, a line each; its remarks go to standard error."""
    from trainer.evaluate import notes_of

    for row in rows.to_pylist():
        print(json.dumps(row) if as_json else _row(row))
    for note in notes_of(rows):
        print(note, file=sys.stderr)


def _row(row: dict[str, Any]) -> str:
    low, high = ("?" if row[end] is None else f"{row[end]:.3f}" for end in ("low", "high"))
    return (
        f"{row['suite']:<22} {row['cell']:<11} {row['category']:<14} {row['metric']:<11} "
        f"{row['scorer']:<20} {row['value']:.3f} [{low}, {high}]  n {row['n']}"
    )
