"""Two processes give the numbers of one, with every weight in both or half of it in each."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer import resume
from trainer.loop import train
from trainer.score import Scorer
from trainer.settings import TrainSettings

SETTINGS = {
    "lr": 3e-3,
    "batch_groups": 9,
    "log_every": 1,
    "max_steps": 14,
    "epochs": 4,
    "precision": "fp32",
    "micro_tokens": 700,
}


def command(groups_file, backbone, out, **changes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    words += ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "--"]
    words += ["trainer", "pretrain"]
    words += ["--groups", str(groups_file), "--start", str(backbone), "--out", str(out)]
    for name, value in {**SETTINGS, **changes}.items():
        words += ["--set", f"{name}={value}"]
    return words


def surroundings():
    return {
        "cwd": Path(__file__).parents[2],
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        "start_new_session": True,
    }


def lines(out):
    return [json.loads(line) for line in (out / resume.LOG).read_text().splitlines()]


def kill_all(process):
    """SIGKILL to torchrun and to its processes, which would outlive it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_numbers_of_one_and_go_on_where_they_were_stopped(
    tmp_path, uneven_groups, backbone, strategy
):
    groups_file = uneven_groups  # so that a mean over each process's own pairs is another number
    alone = train(
        [groups_file], backbone, tmp_path / "one", TrainSettings(**SETTINGS), stage="pretrain"
    )
    changes = {"strategy": strategy, "checkpointing": strategy == "fsdp"}
    two, stopped = tmp_path / "two", tmp_path / "stopped"
    subprocess.run(
        command(groups_file, backbone, two, **changes), check=True, timeout=900, **surroundings()
    )
    names = ("loss", "accuracy", "margin", "grad_norm", "pairs")
    for mine, theirs in zip(alone["curve"], lines(two), strict=True):
        assert max(mine["padding"], theirs["padding"]) < 1 / 32  # of rows that each fills alone
        for name in names:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-6), name
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], rtol=1e-4, atol=1e-5) for key in one)

    process = subprocess.Popen(
        command(groups_file, backbone, stopped, **changes, save_seconds=0.01), **surroundings()
    )
    deadline = time.monotonic() + 600
    while resume.newest(stopped) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    kill_all(process)
    kept = resume.newest(stopped)
    assert kept is not None
    assert int(kept.name.removeprefix("step-")) < SETTINGS["max_steps"]
    Scorer.load(kept)
    subprocess.run(
        command(groups_file, backbone, stopped, **changes, save_seconds=0.01),
        check=True,
        timeout=900,
        **surroundings(),
    )
    for mine, theirs in zip(lines(two), lines(stopped), strict=True):
        assert [mine[name] for name in names] == [theirs[name] for name in names]
