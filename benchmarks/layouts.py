"""Pairs a second of both CPU layouts, forward and backward, at the lengths of real answers.

    OMP_NUM_THREADS=1 python benchmarks/layouts.py [--width 256] [--layers 6] [--candidates 4]

Lengths are drawn as those of prompts and answers are spread: many short, some long. Every round has
lengths of its own, as every step of a training has: shapes that were seen before are much cheaper.
CPU seconds are counted, so other work on the machine disturbs little. The variants alternate, the
first two rounds are dropped, and the last line is JSON.
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
        "width": 256,
        "layers": 6,
        "candidates": 4,
        "prefix": 250,
        "own": 100,
        "pairs": 21,
        "rounds": 5,
        "threads": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precisions", default="bf16,fp32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3 // 64 * 64,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_labels=1,
        pad_token_id=0,
    )
    network = LlamaForSequenceClassification(config)
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, 4096, min(4 * length, max(1, int(rng.gamma(2.0, length / 2)))))

    groups = options.pairs // (options.candidates - 1)
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.rounds + 2):
        pieces = [
            (ids(options.prefix), [ids(options.own) for _ in range(options.candidates)])
            for _ in range(groups)
        ]
        for layout in ("separate", "shared"):
            for name in options.precisions.split(","):
                began = time.process_time()
                with precision(network, name):
                    scores = LAYOUTS[layout](network, pieces)
                scores.pow(2).mean().backward()
                network.zero_grad()
                seconds.setdefault((layout, name), []).append(time.process_time() - began)
    pairs = groups * (options.candidates - 1)
    rates = {
        f"{layout}_{name}": round(pairs / statistics.median(times[2:]), 1)
        for (layout, name), times in seconds.items()
    }
    print(json.dumps({**vars(options), "pairs_per_s": rates}))


if __name__ == "__main__":
    main()
