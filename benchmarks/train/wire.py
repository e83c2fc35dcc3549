"""A contender as a process of its own: commands on standard input, answers on standard output.

Every line is one JSON object. Imported by each contender in its own environment, so it needs
nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
CLOCK = "BENCH_CLOCK"
"""Environment: `cpu` for seconds of this process alone, whatever else the machine does."""

now = time.process_time if os.environ.get(CLOCK) == "cpu" else time.perf_counter


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """Answer every command with what `answer(**command)` says, and the peak memory since."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    replies.write(json.dumps({"ready": True}) + "\n")
    replies.flush()
    for line in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        found = answer(**json.loads(line))
        replies.write(json.dumps({**found, "peak_mib": peak_mib()}) + "\n")
        replies.flush()


def peak_mib() -> float:
    """The most memory resident since the last reset, in MiB."""
    line = next(s for s in STATUS.read_text().splitlines() if s.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def timed(step: Callable[[Any], float], steps: list[Any]) -> dict[str, Any]:
    """Run a warm-up and the steps after it; their seconds and every step's loss."""
    losses = [step(steps[0])]
    began = now()
    losses += [step(s) for s in steps[1:]]
    return {"seconds": now() - began, "losses": losses}
