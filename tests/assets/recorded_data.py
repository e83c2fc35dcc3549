"""A small folder of recorded trajectories, with or without bad lines, and its configuration."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.assets.homes import Home

CONFIG = """\
name: records
recorded: true
threads: 1
lake: {patience: 5}
pairs: {require_same_sampling: false}
groups: {require_same_sampling: false, candidates: 2, rounds: 1}
"""
WORDS = ("oak", "elm", "ash", "fir", "yew", "bay", "box", "fig", "gum", "haw", "ivy", "nut", "pea")
FAULTS = (
    b'{"prompt": "broken", "policy"',
    b'{"prompt": "no policy", "response": "here"}',
    b'{"prompt": "no answer", "policy": "p0", "response": null}',
    b'{"prompt": "not text \xff\xfe", "policy": "p0", "response": "bad bytes"}',
)


def lines(source: str = "small", policies: int = 10, prompts: int = 20) -> list[bytes]:
    """Two answers of each policy to each prompt, all different."""
    rng = random.Random(source)
    return [
        json.dumps(
            {
                "prompt": f"Tell me about number {prompt}.",
                "policy": f"p{policy}",
                "source": source,
                "response": " ".join(rng.choices(WORDS, k=12)),
            }
        ).encode()
        for prompt in range(prompts)
        for policy in range(policies)
        for _ in range(2)
    ]


def write(folder: Path, rows: list[bytes]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "trajectories.jsonl").write_bytes(b"\n".join(rows) + b"\n")


def records(folder: Path, home: Path, rows: list[bytes] | None = None) -> Home:
    """The home `home` with recorded data and its configuration in `folder`."""
    write(folder / "data", rows if rows is not None else lines())
    config = folder / "records.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    return Home(home, config, folder / "data")
