"""A small parent process that never lets a server outlive the driver that asked for it.

`python -I guard.py COMMAND...`: starts the command in a session of its own and watches standard
input, whose other end the driver holds. When that end closes, for whatever reason (a driver that
was killed included), or when the command ends, all that descends from this process is ended: asked
first, then killed, stopped processes and those that left their group too. It exits as the command
did. Only the standard library is used, so that it starts at once and stays small; nothing here
knows what the command is.

The descendants stay findable because this process adopts orphans (`PR_SET_CHILD_SUBREAPER`, Linux);
elsewhere the command's process group is all that is ended.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import TextIO

GRACE = 10.0  # seconds between asking and killing
TICK = 0.1
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    """Run the command until it ends or the driver lets go; returns the exit code."""
    driver = os.getppid()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda sent, _: told.append(sent))
    child = os.fork()
    if child == 0:
        _become(command)
    code: int | None = None
    while code is None and not told and os.getppid() == driver and not _closed(sys.stdin):
        code = _reap(child)
    _end_all(child)
    return code if code is not None else 0


def _become(command: list[str]) -> None:
    """In the child: a session of its own, no way to the driver's pipe, then the command."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # should the guard itself be killed
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def _closed(pipe: TextIO) -> bool:
    """Wait a moment; whether the driver's end of the pipe is closed."""
    try:
        ready, _, _ = select.select([pipe], [], [], TICK)
        return bool(ready) and not os.read(0, 4096)
    except OSError:
        return True


def _reap(child: int) -> int | None:
    """Bury what has ended; the exit code of the command if it was among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            code = code if code >= 0 else 128 - code


def _end_all(child: int) -> None:
    """Ask the command's group to end, wait, and kill whatever is left of the family."""
    _signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        _reap(child)
        if not _family():
            return
        time.sleep(TICK / 2)
    while True:
        _signal_group(child, signal.SIGKILL)
        for pid in (family := _family()):
            _signal(pid, signal.SIGKILL)
        _reap(child)
        if not family:
            return
        time.sleep(TICK / 2)


def _family() -> set[int]:
    """All descendants of this process that are not zombies."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(path.parent.name)] = int(fields[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _prctl(option: int, value: int) -> None:
    """Set a property of this process; a system without it goes on without."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
