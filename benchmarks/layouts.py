"""Pairs a second of both memory layouts in both precisions, forward and backward, on one core.

    OMP_NUM_THREADS=1 python benchmarks/layouts.py [--width 128] [--layers 3] [--candidates 4]

CPU seconds are counted, so other work on the machine disturbs little. The variants alternate, the
first round is dropped, and the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from trainer.layout import LAYOUTS, precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {
        "width": 128,
        "layers": 3,
        "candidates": 4,
        "prefix": 150,
        "own": 60,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_labels=1,
        pad_token_id=0,
    )
    network = LlamaForSequenceClassification(config)
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, 2000, rng.integers(length - 10, length + 10))

    groups = 16
    pieces = [
        (ids(options.prefix), [ids(options.own) for _ in range(options.candidates)])
        for _ in range(groups)
    ]
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(7):
        for layout, function in LAYOUTS.items():
            for name in ("fp32", "bf16"):
                began = time.process_time()
                with precision(network, name):
                    scores = function(network, pieces)
                scores.pow(2).mean().backward()
                network.zero_grad()
                seconds.setdefault((layout, name), []).append(time.process_time() - began)
    pairs = groups * (options.candidates - 1)
    rates = {
        f"{layout}_{name}": round(pairs / statistics.median(times[1:]), 1)
        for (layout, name), times in seconds.items()
    }
    print(json.dumps({**vars(options), "pairs_per_s": rates}))


if __name__ == "__main__":
    main()
