"""Runs of one corpus take turns: a lock, and the folder of scratch files that it guards.

A whole `polar run` holds it; of runs that Dagster starts otherwise, the assets that leave files
between stages. All others only publish, in one transaction each.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from assets.workspace import Workspace
from pipelines import locks


@contextmanager
def alone(workspace: Workspace, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of this corpus; `say` is told where another run has to be waited for.

    Within a run that holds it already, which is known by its workspace, this does nothing.
    """
    if workspace.has_turn:
        yield
        return
    workspace.run_lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.exclusive(workspace.run_lock, patience=0))
        except locks.WaitedTooLongError:
            if say:
                holder = locks.holders(workspace.run_lock)
                say(f"waiting for {holder}, which is making this corpus")
            stack.enter_context(locks.exclusive(workspace.run_lock, patience=math.inf))
        workspace.has_turn = True
        try:
            yield
        finally:
            workspace.has_turn = False


@contextmanager
def scratch(
    workspace: Workspace, name: str, say: Callable[[str], None] | None = None
) -> Iterator[Path]:
    """An empty folder for a stage's files, of one run at a time."""
    work = workspace.work_dir / name
    with alone(workspace, say):
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        work.mkdir(parents=True)
        yield work
        shutil.rmtree(work)
