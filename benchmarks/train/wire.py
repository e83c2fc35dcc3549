"""A contender as a process of its own: commands on standard input, answers on standard output.

Every line is one JSON object. Imported by each contender in its own environment, so it needs
nothing but the standard library, and torch where a GPU is measured.
"""

from __future__ import annotations

import gc
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
ON = "BENCH_DEVICE"
"""Environment: torch's name of the device that networks run on."""
DEVICE = os.environ.get(ON, "cpu")
if DEVICE == "cuda":
    import torch

clock = time.process_time if os.environ.get(CLOCK) == "cpu" else time.perf_counter


def now() -> float:
    """Seconds of the clock, once the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock()


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """Answer every command with what `answer(**command)` says, and the peak memory since."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    replies.write(json.dumps({"ready": True}) + "\n")
    replies.flush()
    for line in sys.stdin:
        forget_peak()
        found = answer(**json.loads(line)) | {"peak_mib": peak_mib()}
        leave_room()
        replies.write(json.dumps(found) + "\n")
        replies.flush()


def forget_peak() -> None:
    """Let the count of `peak_mib` start again."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again


def leave_room() -> None:
    """Give back what is no longer used of a GPU, for the contenders share it."""
    if DEVICE == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def peak_mib() -> float:
    """The most memory held since the last reset, in MiB: of the GPU, or resident."""
    if DEVICE == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    line = next(s for s in STATUS.read_text().splitlines() if s.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def timed(step: Callable[[Any], float], steps: list[Any]) -> dict[str, Any]:
    """Run a warm-up and the steps after it; their seconds and every step's loss."""
    losses = [step(steps[0])]
    began = now()
    losses += [step(s) for s in steps[1:]]
    return {"seconds": now() - began, "losses": losses}
