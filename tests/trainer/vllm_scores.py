"""Scores from vLLM itself: a program for the environment that `make vllm` makes.

python vllm_scores.py FOLDER TASK IDS.json SCORES.json
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def main(folder: str, task: str, asked: str, out: str) -> None:
    from vllm import LLM, PoolingParams, TokensPrompt

    sequences = json.loads(Path(asked).read_text())
    # The official tokenizer is code of its folder; the plain one must be good enough for a server.
    own_code = task == "token_classify"
    model = LLM(
        folder, runner="pooling", dtype="float32", enforce_eager=True, skip_tokenizer_init=own_code
    )
    found = model.encode(
        [TokensPrompt(prompt_token_ids=ids) for ids in sequences],
        pooling_params=PoolingParams(task=task, use_activation=False),
        pooling_task=task,
        use_tqdm=False,
    )
    scores = [output.outputs.data.flatten()[-1].item() for output in found]
    Path(out).write_text(json.dumps(scores))


if __name__ == "__main__":
    main(*sys.argv[1:])
