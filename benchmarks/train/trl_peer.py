"""TRL's RewardTrainer as a contender.

    python trl_peer.py MODEL

The dataset is tokenised beforehand and read in order, so a step has exactly the pairs it is given.
Seconds are counted from the end of one step to the end of another, as the trainer's callbacks see
them. Needs trl alone.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
import wire
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer


class Clock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(wire.now())


class Recorded(RewardTrainer):
    """The trainer, which also keeps every loss."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)
        loss = found[0] if isinstance(found, tuple) else found
        self.parts.append(loss.detach())
        return found


def answer(
    task: str,
    steps: list[Any],
    threads: int,
    bf16: bool,
    lr: float,
    attention: str = "sdpa",
    optimiser: str = "adamw_torch_fused",
    micro: int | None = None,
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    size = len(steps[0])
    micro = micro or size
    network = AutoModelForSequenceClassification.from_pretrained(
        sys.argv[1], attn_implementation=attention
    )
    rows = [pair for step in steps for pair in step]
    data = Dataset.from_dict(
        {"chosen_ids": [c for c, _ in rows], "rejected_ids": [r for _, r in rows]}
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        config = RewardConfig(
            output_dir=out,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=size // micro,
            max_steps=len(steps),
            max_length=None,
            learning_rate=lr,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            weight_decay=0.0,
            optim=optimiser,
            bf16=bf16,
            use_cpu=wire.DEVICE == "cpu",
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Recorded(
            model=network,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(sys.argv[1]),
            callbacks=[clock],
        )
        trainer.parts = []
        trainer.train()
    per = size // micro
    losses = [
        float(sum(trainer.parts[at : at + per]) / per) for at in range(0, len(trainer.parts), per)
    ]
    return {"seconds": clock.ends[-1] - clock.ends[0], "losses": losses}


if __name__ == "__main__":
    wire.serve(answer)
