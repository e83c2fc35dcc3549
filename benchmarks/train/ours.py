"""Our trainer as a contender: the loop's own step over groups, and the scorer's layout.

python ours.py MODEL
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wire
from transformers import AutoModelForSequenceClassification

from trainer.distributed import World
from trainer.layout import LAYOUTS, precision
from trainer.loop import _Run
from trainer.packing import IdsBuilder
from trainer.settings import TrainSettings

FOLDER = Path(sys.argv[1])


class Model:
    """What the loop needs of a reward model; its ids were made beforehand."""

    def __init__(self) -> None:
        self.network = AutoModelForSequenceClassification.from_pretrained(FOLDER).to(wire.DEVICE)


def answer(task: str, steps: list[Any], threads: int, **options: Any) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return {"train": train, "score": score}[task](steps, **options)


def train(steps: list[Any], bf16: bool, lr: float) -> dict[str, Any]:
    builder = IdsBuilder()
    for step in steps:
        for group in step:
            builder.add(group, [0] + [1] * (len(group) - 1), "")
    ids = builder.build()
    ends = np.cumsum([len(step) for step in steps])
    batches = np.split(np.arange(ends[-1]), ends[:-1])
    settings = TrainSettings(
        lr=lr, floor=1, warmup=0, precision="bf16" if bf16 else "fp32", batch_groups=len(steps[0])
    )
    with tempfile.TemporaryDirectory() as out:
        run: Any = _Run(Model(), ids, Path(out), settings, {}, None, World())  # type: ignore[arg-type]
    run.model.network.train()

    def step(batch: np.ndarray) -> float:
        before = run.interval["loss"], run.interval["pairs"]
        run._take_step(batch)
        return (run.interval["loss"] - before[0]) / (run.interval["pairs"] - before[1])

    return wire.timed(step, batches)


@torch.inference_mode()
def score(steps: list[Any], bf16: bool) -> dict[str, Any]:
    network = Model().network.eval()
    builder = IdsBuilder()
    for step in steps:
        for group in step:
            builder.add(group, [0] * len(group), "")
    ids = builder.build()
    pieces = [(ids.prefix(g), ids.suffixes(g)) for g in range(len(ids))]
    scores, at, began = [], 0, 0.0
    for number, step in enumerate(steps):
        if number == 1:
            began = wire.now()
        with precision(network, "bf16" if bf16 else "fp32"):
            scores += LAYOUTS["shared"](network, pieces[at : at + len(step)]).tolist()
        at += len(step)
    return {"seconds": wire.now() - began, "scores": scores}


if __name__ == "__main__":
    wire.serve(answer)
