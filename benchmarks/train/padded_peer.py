"""Plain padded pairs in a loop around transformers, as a contender.

    python padded_peer.py MODEL

Needs torch and transformers alone.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
import wire
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification


def answer(task: str, steps: list[Any], threads: int, **options: Any) -> dict[str, Any]:
    torch.set_num_threads(threads)
    network = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).to(wire.DEVICE)
    return {"train": train, "score": score}[task](network, steps, **options)


def scores_of(network: Any, rows: list[list[int]], bf16: bool) -> torch.Tensor:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), network.config.pad_token_id)
    mask = torch.zeros_like(ids)
    for line, seen, row in zip(ids, mask, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
        seen[: len(row)] = 1
    ids, mask = ids.to(wire.DEVICE), mask.to(wire.DEVICE)
    with torch.autocast(wire.DEVICE, torch.bfloat16) if bf16 else nullcontext():
        return network(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1)


def train(network: Any, steps: list[Any], bf16: bool, lr: float, micro: int) -> dict[str, Any]:
    network.train()
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    def step(pairs: list[Any]) -> float:
        total = 0.0
        for first in range(0, len(pairs), micro):
            some = pairs[first : first + micro]
            rows = [chosen for chosen, _ in some] + [rejected for _, rejected in some]
            scores = scores_of(network, rows, bf16).float()
            losses = -logsigmoid(scores[: len(some)] - scores[len(some) :])
            loss = losses.sum() / len(pairs)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return total

    return wire.timed(step, steps)


@torch.inference_mode()
def score(network: Any, steps: list[Any], bf16: bool) -> dict[str, Any]:
    network.eval()
    scores, began = [], 0.0
    for number, rows in enumerate(steps):
        if number == 1:
            began = wire.now()
        scores += scores_of(network, rows, bf16).float().tolist()
    return {"seconds": wire.now() - began, "scores": scores}


if __name__ == "__main__":
    wire.serve(answer)
