"""A run's folder: saving so that a kill leaves something usable, and going on from there.

`out/resume/step-N` is a complete checkpoint plus `state.pt`, put in place by one rename; the older
one goes only then. When the run ends, the model moves to `out`, `polar.json` last, and
`training.json` says that nothing is left to do. What is in the state belongs to `loop`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError

from trainer.errors import BadCheckpointError, ResumeError
from trainer.model import RECORD, RewardModel
from trainer.packing import Ids

LOG = "metrics.jsonl"
DONE = "training.json"
STATE = "state.pt"
FREE = ("checkpointing", "log_every", "micro_tokens", "save_seconds", "strategy", "tensorboard")
"""Settings that may change between a start and its resumption: none decides what is learned."""


@contextmanager
def only_trainer(out: Path) -> Iterator[None]:
    """Hold a folder against other trainers; a process that ends, however it ends, lets go.

    Raises:
        ResumeError: another process is training there.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            msg = (
                f"{out}: another trainer is writing there; wait for it, stop it, or choose another "
                f"folder"
            )
            raise ResumeError(msg) from error
        yield
    finally:
        os.close(folder)


def emptied(out: Path) -> None:
    """Remove what is in a folder, unless a trainer is writing there.

    Raises:
        ResumeError: another process is training there.
    """
    with only_trainer(out):
        for found in out.iterdir():
            shutil.rmtree(found) if found.is_dir() else found.unlink()


def identity(settings: BaseModel, stage: str, start: Path, ids: Ids) -> dict[str, Any]:
    """What makes a run this run: settings, stage, starting weights and token ids."""
    chosen = settings.model_dump(mode="json", exclude=set(FREE))
    return {
        **chosen,
        "stage": stage,
        "starting weights": weights_digest(start),
        "groups": ids.digest(),
    }


def weights_digest(start: Path) -> str:
    """What tells the weights of one checkpoint from those of another."""
    weights = hashlib.blake2b(digest_size=16)
    for file in sorted(start.glob("*.safetensors")):
        with file.open("rb") as stream:
            weights.update(hashlib.file_digest(stream, "blake2b").digest())
    return weights.hexdigest()


def finished(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a run that already ended in `out`, or None if there is work to do.

    Raises:
        ResumeError: another run ended there.
    """
    if not (out / DONE).is_file():
        return None
    try:
        record = json.loads((out / DONE).read_text(encoding="utf-8"))
        found, summary = record["identity"], record["summary"]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{out / DONE}: not the record of a training run; remove {out} and train again"
        raise ResumeError(msg) from error
    _require_same(found, wanted, out)
    return summary


def newest(out: Path) -> Path | None:
    """The last complete checkpoint of a run that has not ended."""
    steps = (out / "resume").glob("step-*")
    return max(steps, key=lambda path: path.name, default=None)


def restore(out: Path, wanted: dict[str, Any]) -> tuple[RewardModel, dict[str, Any]] | None:
    """The model last saved and the state saved with it, if there is one.

    Raises:
        ResumeError: it belongs to another run or is damaged.
    """
    path = newest(out)
    if path is None:
        return None
    try:
        saved = torch.load(path / STATE, map_location="cpu", weights_only=True)
        _require_same(saved["identity"], wanted, out)
        return RewardModel.load(path), saved["state"]
    except (
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        TypeError,
        BadCheckpointError,
        SafetensorError,
    ) as error:
        msg = (
            f"{path}: cannot go on from here ({error}); "
            f"remove {path.parent} to train from the start"
        )
        raise ResumeError(msg) from error


def save(
    out: Path,
    model: RewardModel,
    state: dict[str, Any],
    wanted: dict[str, Any],
    weights: dict[str, Any] | None = None,
) -> None:
    """Save a checkpoint with its state; the one before stays until this one is complete.

    `weights` are the network's, gathered, where no process holds all of them.
    """
    unfinished = _unfinished(out, model, weights)
    torch.save({"identity": wanted, "state": state}, unfinished / STATE)
    target = unfinished.with_name(f"step-{state['step']:09d}")
    if target.exists():  # saved, then killed before another step was taken
        shutil.rmtree(target)
    unfinished.rename(target)
    for old in target.parent.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def finish(
    out: Path,
    model: RewardModel,
    wanted: dict[str, Any],
    summary: dict[str, Any],
    weights: dict[str, Any] | None = None,
) -> None:
    """Put the trained model into `out` and drop what was kept for resuming (see `save`)."""
    unfinished = _unfinished(out, model, weights)
    record = json.dumps({"identity": wanted, "summary": summary}, indent=1)
    (unfinished / DONE).write_text(record + "\n", encoding="utf-8")
    last = (RECORD, DONE)
    for file in sorted(unfinished.iterdir(), key=lambda file: (file.name in last, file.name)):
        file.replace(out / file.name)
    shutil.rmtree(unfinished.parent)


def _unfinished(out: Path, model: RewardModel, weights: dict[str, Any] | None) -> Path:
    """The model in a new folder beside the steps, which nothing takes for one of them."""
    folder = out / "resume" / "unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    model.save(folder, weights)
    return folder


def trim_log(out: Path, step: int) -> None:
    """Drop the lines of steps that are about to be taken again."""
    out.mkdir(parents=True, exist_ok=True)
    kept = [line for line in read_log(out) if line["step"] <= step]
    (out / LOG).write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def append_log(out: Path, line: dict[str, Any]) -> None:
    """Add one line to the metrics file."""
    with (out / LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def read_log(out: Path) -> list[dict[str, Any]]:
    """The lines of the metrics file; one that a kill cut off is left out."""
    lines = []
    if (out / LOG).is_file():
        for line in (out / LOG).read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def _require_same(found: dict[str, Any], wanted: dict[str, Any], out: Path) -> None:
    differing = [
        f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted((found.keys() | wanted.keys()) - set(FREE))
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        msg = (
            f"{out} holds another training run ({'; '.join(differing)}); "
            f"choose another folder, or remove it to train again"
        )
        raise ResumeError(msg)
