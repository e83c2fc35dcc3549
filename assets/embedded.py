"""Training the embedded pool: the recipes of `pipelines` handed to the trainer.

Runs that do not build on each other train side by side, a process and a thread each: models of a
million parameters gain nothing from a second thread. `python -m assets.embedded` is such a process.
What the recipes say is in `pipelines/embedded.py`, how a decoder is trained in
`trainer/language_model.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from assets.digests import digest
from assets.progress import Progress
from assets.workspace import Workspace
from pipelines import embedded
from pipelines.errors import PolarError
from trainer.language_settings import LanguageModelSettings

DONE = "recipe.json"
Job = dict[str, Any]  # run, settings, recipe: what one training is made from


def train_pool(workspace: Workspace, progress: Progress) -> dict[str, float]:
    """Train every run of the pool's `embedded` section that is not there yet.

    Returns:
        The loss of each run (nats per token).

    Raises:
        PolarError: a training process failed; its last words are in the message.
    """
    pool, folder = workspace.embedded, workspace.policies_dir
    if pool is None:
        return {}
    settings = {run.name: LanguageModelSettings(**pool.settings(run)) for run in pool.runs}
    recipe = digest({"vocab_size": pool.vocab_size, "texts": embedded.tokenizer_texts()})
    if _finished(folder / "tokenizer", recipe) is None:
        from trainer.language_model import train_tokenizer

        context = max(setting.context for setting in settings.values())
        texts = embedded.tokenizer_texts()
        train_tokenizer(texts, pool.vocab_size, folder / "tokenizer", context=context)
        _finish(folder / "tokenizer", recipe, 0.0)
    recipes, lanes = {"": recipe}, dict[str, list[Job]]()
    lane_of: dict[str, str] = {}
    for run in pool.runs:
        setting = settings[run.name].model_dump(mode="json")
        parts = [recipes[run.start or ""], setting, embedded.documents(run)]
        recipes[run.name] = digest(parts)
        lane_of[run.name] = lane_of[run.start] if run.start else run.name
        if _finished(folder / run.name, recipes[run.name]) is None:
            job: Job = {"run": run.model_dump(mode="json"), "settings": setting}
            job["recipe"] = recipes[run.name]
            lanes.setdefault(lane_of[run.name], []).append(job)
    _train_lanes(folder, list(lanes.values()), workspace.config.threads, progress)
    return {
        run.name: loss
        for run in pool.runs
        if (loss := _finished(folder / run.name, recipes[run.name])) is not None
    }


def _train_lanes(folder: Path, lanes: list[list[Job]], at_once: int, progress: Progress) -> None:
    """Train lanes of jobs, `at_once` at a time; jobs of one lane one after the other."""
    total = sum(job["settings"]["steps"] for lane in lanes for job in lane)
    steps: dict[str, int] = {}
    lock, children = threading.Lock(), list[subprocess.Popen[str]]()

    def train_lane(lane: list[Job]) -> None:
        for name, step, note in _in_a_process(folder, lane, children):
            with lock:
                steps[name] = step
                progress(sum(steps.values()), total, f"{name}: {note}")

    with ThreadPoolExecutor(max_workers=at_once) as pool:
        try:
            for done in [pool.submit(train_lane, lane) for lane in lanes]:
                done.result()
        finally:
            for child in children:
                with suppress(ProcessLookupError):
                    child.terminate()
            pool.shutdown(cancel_futures=True)


def _in_a_process(
    folder: Path, lane: list[Job], children: list[subprocess.Popen[str]]
) -> Iterator[tuple[str, int, str]]:
    """Train a lane in a child process; yields (run, step, note) as it goes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (
        tempfile.TemporaryFile("w+") as words,
        subprocess.Popen(
            [sys.executable, "-m", "assets.embedded", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
        ) as child,
    ):
        children.append(child)
        assert child.stdin is not None  # noqa: S101 - for the type checker
        assert child.stdout is not None  # noqa: S101
        child.stdin.write(json.dumps(lane))
        child.stdin.close()
        for line in child.stdout:
            name, step, note = line.rstrip("\n").split("\t")
            yield name, int(step), note
        if child.wait() != 0:
            words.seek(0)
            msg = f"training of the embedded pool failed: {words.read()[-2000:].strip()}"
            raise PolarError(msg)


def _train(folder: Path, lane: list[Job]) -> None:
    """The child's part: train jobs in order, telling each step on standard output."""
    import torch

    from trainer.language_model import train

    torch.set_num_threads(1)
    for job in lane:
        run = embedded.Run.model_validate(job["run"])

        def tell(step: int, _: int, note: str, name: str = run.name) -> None:
            print(name, step, note, sep="\t", flush=True)

        loss = train(
            embedded.documents(run),
            folder / "tokenizer",
            folder / run.name,
            LanguageModelSettings.model_validate(job["settings"]),
            tell,
            folder / run.start if run.start else None,
        )["loss"]
        _finish(folder / run.name, job["recipe"], float(loss))


def _finished(folder: Path, recipe: str) -> float | None:
    """The loss of a run that was finished with this recipe."""
    try:
        found = json.loads((folder / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return float(found["loss"]) if found.get("recipe") == recipe else None


def _finish(folder: Path, recipe: str, loss: float) -> None:
    content = json.dumps({"recipe": recipe, "loss": loss})
    (folder / DONE).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    _train(Path(sys.argv[1]), json.load(sys.stdin))
