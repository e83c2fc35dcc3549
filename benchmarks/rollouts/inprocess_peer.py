"""`LLM.generate` on the requests that the driver sent, in a process of vLLM's own environment.

    python inprocess_peer.py SETTINGS.json

Says a line when the model is there, then one for each line on standard input, after a run: seconds,
and tokens of prompts and answers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

NO_SAMPLING = {"model", "prompt", "return_token_ids", "add_special_tokens"}


def generate(llm: LLM, bodies: list[dict[str, Any]]) -> dict[str, float]:
    start = time.perf_counter()
    sampling = [
        SamplingParams(**{name: value for name, value in body.items() if name not in NO_SAMPLING})
        for body in bodies
    ]
    special = {"add_special_tokens": bodies[0].get("add_special_tokens", True)}
    found = llm.generate(
        [body["prompt"] for body in bodies], sampling, use_tqdm=False, tokenization_kwargs=special
    )
    return {
        "seconds": time.perf_counter() - start,
        "prompt_tokens": sum(len(one.prompt_token_ids or ()) for one in found),
        "tokens": sum(len(answer.token_ids) for one in found for answer in one.outputs),
    }


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    settings = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(**settings["llm"])
    print("ready", file=replies, flush=True)
    for _ in sys.stdin:
        print(json.dumps(generate(llm, settings["bodies"])), file=replies, flush=True)


if __name__ == "__main__":
    main()
