"""Locks between processes: one publisher of a lake at a time, and a name for whoever is in the way.

DuckLake lets several writers race and fails the slower one, whose work is then repeated. Our own
publishers queue instead; programs that are not ours are met by retrying (`lake.py`).
"""

from __future__ import annotations

import fcntl
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WaitedTooLongError(Exception):
    """A lock stayed taken for longer than the caller had patience."""


def delays(first: float = 0.05, last: float = 2.0) -> Iterator[float]:
    """Seconds to wait before each further attempt: growing by half, bounded, with jitter."""
    delay = first
    while True:
        yield delay * random.uniform(0.7, 1.3)
        delay = min(delay * 1.5, last)


@contextmanager
def exclusive(path: Path, patience: float) -> Iterator[None]:
    """Hold the lock file `path`; the system frees it when the process ends, however it ends.

    Raises:
        WaitedTooLongError: another process or thread holds it for longer than `patience` seconds.
    """
    deadline = time.monotonic() + patience
    with path.open("a") as file:
        for delay in delays():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise WaitedTooLongError from None
                time.sleep(delay)
        yield


def holders(*paths: Path) -> str:
    """The processes with a write lock on any of `paths`, in words; Linux tells, others do not."""
    inodes = {str(path.stat().st_ino) for path in paths if path.exists()}
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return "another process"
    # 1: POSIX ADVISORY WRITE 4711 fe:00:2146405 120 120   (waiting ones have "->" second)
    locks = [line.split() for line in lines]
    pids = sorted(
        {
            int(lock[4])
            for lock in locks
            if lock[1] != "->" and lock[3] == "WRITE" and lock[5].rpartition(":")[2] in inodes
        }
    )
    return " and ".join(f"process {pid}{_command(pid)}" for pid in pids) or "another process"


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    command = b" ".join(words).decode(errors="replace").strip()
    return f" ({command[:77] + '...' if len(command) > 80 else command})" if command else ""
