"""How long work shows itself: one callable, shown as bars in a terminal or lines in Dagster's log.

Stages call `progress(done, total, note)`; they do not know who listens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

Progress = Callable[[int, int, str], None]


class Log(Protocol):
    """What Dagster's `context.log` offers."""

    def info(self, message: str) -> None:
        """Write one line."""


def log_progress(log: Log, *, every: float = 5.0) -> Progress:
    """A progress callable that writes at most one line per `every` seconds, with an ETA."""
    start = time.monotonic()
    last = start - every

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < every and done < total:
            return
        last = now
        log.info(progress_line(done, total, now - start, note))

    return report


def progress_line(done: int, total: int, elapsed: float, note: str = "") -> str:
    """`done/total (share), ETA, note` as one line."""
    share = done / total if total else 1.0
    left = elapsed * (total - done) / done if done else None
    eta = f", about {duration(left)} left" if left is not None and done < total else ""
    return f"{done:,}/{total:,} ({share:.0%}){eta}{', ' + note if note else ''}"


def duration(seconds: float) -> str:
    """Seconds as a short human form: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
