"""What our rollout driver costs, and what servers for a pool of tiny policies cost.

    python -m benchmarks.rollouts.bench [--rounds 5] [--prompts N] [--policies 12] [--weights DIR]

First our driver, a bare asynchronous client and `LLM.generate` on Gemma 3 270M (overhead.py), then
a pool of tiny policies (pool.py). Gemma is fetched and converted once, under
POLAR_HOME/bench/rollouts; where it cannot be had a Llama of 25 million random parameters takes its
place, and `model` says so. `--rounds 0` and `--policies 0` leave a part out. The last line is one
JSON object of medians; docs/rollouts.md says what each number means.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rollouts import overhead, pool, workload


def model(given: Path | None, home: Path) -> tuple[str, Path]:
    """Name and folder of the model that the driver's overhead is measured on."""
    if given:
        return given.name, given
    if found := workload.gemma(home):
        return "Gemma 3 270M", found
    name = f"random Llama of 25 million parameters, for {workload.GEMMA} could not be installed"
    return name, workload.random_llama(home / "random", width=512, layers=8, heads=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, help="another model instead of Gemma 3 270M")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--policies", type=int, default=12)
    parser.add_argument("--pool-prompts", type=int, default=50)
    parser.add_argument("--pool-rounds", type=int, default=1)
    arguments = parser.parse_args()
    home = Path(os.environ.get("POLAR_HOME", "var")).absolute() / "bench" / "rollouts"
    home.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        if arguments.rounds:
            name, weights = model(arguments.weights, home)
            found |= {"model": name, **overhead.measure(weights, arguments, Path(scratch))}
        if arguments.policies:
            found["pool"] = pool.measure(arguments, Path(scratch))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
