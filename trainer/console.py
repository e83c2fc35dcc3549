"""How a command shows that it works: a bar with the time left on a terminal, lines elsewhere.

What is counted belongs to the caller; lines for machines to `metrics`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
    last, written = time.monotonic() - EVERY, ""

    def line(done: int, total: int, note: str) -> None:
        nonlocal last, written
        text = f"{100 * done // max(total, 1):3d} %  {note}"
        if text != written and (time.monotonic() - last >= EVERY or done == total):
            last, written = time.monotonic(), text
            print(text, file=sys.stderr, flush=True)

    yield line
