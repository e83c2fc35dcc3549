"""Training: groups in, a checkpoint out; stop it at any step and it goes on with the same numbers.

    OMP_NUM_THREADS=2 python -m trainer pretrain --groups groups.parquet --start LM --out DIR

The order of groups is a function of (seed, epoch), and each step of its number, so a run resumes
from weights, optimiser state and step alone. While it runs, `out/resume/step-N` is a complete
checkpoint; at the end the model lies in `out` itself, beside `metrics.jsonl` and `training.json`.

What a step computes belongs to `layout` and `loss`; saving and finding a run to `resume`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import lora, resume
from trainer.errors import BadGroupsError, DivergedError
from trainer.layout import LAYOUTS, precision
from trainer.loss import bradley_terry
from trainer.model import RewardModel, Stage
from trainer.optim import adamw, learning_rate
from trainer.packing import Ids, Progress, batches, microbatches, tokenise
from trainer.settings import TrainSettings
from trainer.template import Limits, Wrapper

WRAPPERS: dict[Stage, Wrapper] = {"pretrain": "pretrain", "finetune": "sft"}


def train(
    groups: Sequence[Path],
    start: Path,
    out: Path,
    settings: TrainSettings,
    *,
    stage: Stage,
    parents: Sequence[str] = (),
    snapshot: int | None = None,
    checkpoint_id: str | None = None,
    split: str = "train",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a reward model on the groups of `split` and leave its checkpoint in `out`.

    Args:
        groups: groups files (Parquet or JSONL).
        start: a language-model checkpoint or a POLAR checkpoint.
        out: a folder that is new, or holds this same run, which is then gone on with.
        settings: see `TrainSettings`.
        stage: written to the checkpoint; it also decides the wrapper that scoring uses unless told.
        parents: ids of the checkpoints this one descends from.
        snapshot: the lake snapshot that the groups come from.
        checkpoint_id: the id this checkpoint goes by.
        split: which groups to train on.
        progress: called at most a few times a second with thousandths done, 1000, and a note.

    Returns:
        Steps, epochs, groups, pairs, tokens (as separate sequences would have), seconds, loss and
        accuracy of the last interval, `curve` (the lines of metrics.jsonl), and `counts` of groups.

    Raises:
        BadGroupsError: the groups cannot be read, or none can be learned from.
        BadCheckpointError: `start` cannot be used.
        ResumeError: `out` holds another run, or one that cannot be gone on with.
        DivergedError: the loss or the gradient is not finite.
    """
    out = Path(out)
    limits = None
    if settings.max_length is not None and settings.max_response_length is not None:
        limits = Limits(settings.max_length, settings.max_response_length)
    model = RewardModel.start(Path(start), wrapper=WRAPPERS[stage], limits=limits)
    ids, counts = tokenise(groups, model.template, split=split, progress=progress)
    if not len(ids):
        msg = f"no group of split {split!r} to train on in {', '.join(map(str, groups))}: {counts}"
        raise BadGroupsError(msg)
    identity = resume.identity(settings, stage, Path(start), ids)
    finished = resume.finished(out, identity)
    if finished is not None:
        return finished
    restored, state = resume.restore(out, identity) or (model, {})
    if settings.lora:  # what was saved is merged; adapters go on from where training started
        adapters = state.pop("adapters", None)
        lora.attach(model.network, settings.lora, seed=settings.seed, state=adapters)
    else:
        model = restored
    changes = {"stage": stage, "snapshot": snapshot, "checkpoint_id": checkpoint_id}
    record = model.record.model_copy(update={**changes, "parents": tuple(parents)})
    model = RewardModel(model.network, model.tokenizer, record).place()
    run = _Run(model, ids, out, settings, identity, progress)
    run.go(state)
    summary = run.summary(counts)
    if settings.lora and settings.lora.keep:
        lora.save(model.network, settings.lora, Path(start), out / lora.FOLDER)
    resume.finish(out, model, identity, summary)
    return summary


class _Run:
    """The state of one training run, between steps."""

    def __init__(
        self,
        model: RewardModel,
        ids: Ids,
        out: Path,
        settings: TrainSettings,
        identity: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        self.model, self.ids, self.out = model, ids, out
        self.settings, self.identity, self.progress = settings, identity, progress
        self.lengths = ids.lengths()
        self.costs = self.lengths * [len(ids.group_ranks(g)) for g in range(len(ids))]
        self.layout = LAYOUTS[settings.layout]
        self.optimiser = adamw(model.network, settings)
        self.epoch_steps = len(self._plan(0))
        limit = settings.max_steps or math.inf
        self.total = int(min(settings.epochs * self.epoch_steps, limit))
        self.step, self.elapsed, self.pairs, self.tokens = 0, 0.0, 0, 0
        self.interval, self.last = _empty_interval(), _empty_interval() | {"accuracy": 0.0}

    def go(self, state: dict[str, Any]) -> None:
        """Run from `state` (empty for a new run) to the end, logging and saving on the way."""
        if state:
            self.optimiser.load_state_dict(state.pop("optimiser"))
            vars(self).update(state)
        resume.trim_log(self.out, self.step)
        self.model.network.train()
        clock, saved, told = time.perf_counter() - self.elapsed, self.elapsed, 0.0
        plan, planned = self._plan(0), 0
        while self.step < self.total and self._done() < 1:
            epoch, index = divmod(self.step, self.epoch_steps)
            if epoch != planned:
                plan, planned = self._plan(epoch), epoch
            self._take_step(plan[index])
            self.elapsed = time.perf_counter() - clock
            if self.step % self.settings.log_every == 0 or self.step == self.total:
                self._write_interval()
            if self.progress and self.elapsed - told > 0.3:
                told = self.elapsed
                self.progress(round(1000 * self._done()), 1000, self._note())
            if self.elapsed - saved > self.settings.save_seconds and self.step < self.total:
                resume.save(self.out, self.model, self.state(), self.identity)
                saved = self.elapsed
        if self.interval["pairs"]:
            self._write_interval()
        if self.progress:
            self.progress(1000, 1000, self._note())

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs beside the weights."""
        names = ("step", "elapsed", "pairs", "tokens", "interval")
        return {
            "optimiser": self.optimiser.state_dict(),
            **({"adapters": lora.weights(self.model.network)} if self.settings.lora else {}),
            **{name: getattr(self, name) for name in names},
        }

    def summary(self, counts: dict[str, int]) -> dict[str, Any]:
        """What `train` returns."""
        curve = resume.read_log(self.out)
        last = curve[-1] if curve else {}
        return {
            "steps": self.step,
            "epochs": self.step / self.epoch_steps,
            "groups": len(self.ids),
            "pairs": self.pairs,
            "tokens": self.tokens,
            "seconds": round(self.elapsed, 3),
            "loss": last.get("loss"),
            "accuracy": last.get("accuracy"),
            "counts": counts,
            "curve": curve,
        }

    def _plan(self, epoch: int) -> list[np.ndarray]:
        settings = self.settings
        return batches(self.lengths, settings.batch_groups, seed=settings.seed, epoch=epoch)

    def _done(self) -> float:
        """The share of the training that is behind, by steps or by the clock."""
        by_clock = self.elapsed / self.settings.max_seconds if self.settings.max_seconds else 0.0
        return max(self.step / self.total, by_clock)

    def _take_step(self, batch: np.ndarray) -> None:
        """One optimiser step over the pairs of `batch`, in parts that fit `micro_tokens`."""
        network, settings, ids = self.model.network, self.settings, self.ids
        torch.manual_seed(settings.seed * 1_000_003 + self.step)
        ranks = [ids.group_ranks(g) for g in batch]
        pairs = sum(int((r[:, None] < r[None, :]).sum()) for r in ranks)
        totals = _empty_interval()
        for part in microbatches(self.costs[batch], settings.micro_tokens):
            chosen = batch[part]
            with precision(network, settings.precision):
                scores = self.layout(network, [(ids.prefix(g), ids.suffixes(g)) for g in chosen])
            sums = bradley_terry(scores, [ranks[i] for i in part])
            (sums.loss / pairs).backward()
            totals["loss"] += float(sums.loss.detach())
            totals["correct"] += sums.correct
            totals["margin"] += sums.margin
            totals["tokens"] += int(self._sizes(chosen))
        norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip))
        if not math.isfinite(totals["loss"]) or not math.isfinite(norm):
            self._diverged(batch, totals["loss"] / pairs, norm)
        done = max((self.step + 1) / self.total, self._done())
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(done, settings)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        self.pairs += pairs
        self.tokens += int(totals["tokens"])
        totals |= {"pairs": pairs, "grad_norm": norm, "steps": 1}
        self.interval = {key: self.interval[key] + totals[key] for key in totals}

    def _sizes(self, groups: np.ndarray) -> int:
        """Ids in the groups' sequences, counted as if each stood alone."""
        return sum(
            len(self.ids.prefix(g)) + len(suffix) for g in groups for suffix in self.ids.suffixes(g)
        )

    def _diverged(self, batch: np.ndarray, loss: float, norm: float) -> None:
        names = ", ".join(self.ids.group_ids[g] for g in batch[:5])
        kept = resume.newest(self.out)
        msg = (
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}, in the batch with groups "
            f"{names}; lower lr (now {self.settings.lr}) or clip, or train in fp32. "
            f"{f'{kept} holds the last good weights' if kept else 'Nothing was saved yet'}"
        )
        raise DivergedError(msg)

    def _write_interval(self) -> None:
        sums, self.interval = self.interval, _empty_interval()
        seconds = max(self.elapsed - sums["since"], 1e-9)
        self.interval["since"] = self.elapsed
        pairs, steps = sums["pairs"], sums["steps"]
        line = {
            "step": self.step,
            "epoch": round(self.step / self.epoch_steps, 4),
            "seconds": round(self.elapsed, 3),
            "loss": sums["loss"] / pairs,
            "accuracy": sums["correct"] / pairs,
            "margin": sums["margin"] / pairs,
            "grad_norm": sums["grad_norm"] / steps,
            "lr": self.optimiser.param_groups[0]["lr"],
            "pairs": self.pairs,
            "pairs_per_s": round(pairs / seconds, 2),
            "tokens_per_s": round(sums["tokens"] / seconds, 1),
        }
        resume.append_log(self.out, line)
        self.last = line

    def _note(self) -> str:
        sums = self.interval if self.interval["pairs"] else None
        if sums:
            loss, accuracy = sums["loss"] / sums["pairs"], sums["correct"] / sums["pairs"]
        else:
            loss, accuracy = self.last["loss"], self.last["accuracy"]
        return f"step {self.step}, loss {loss:.3f}, accuracy {accuracy:.3f}"


def _empty_interval() -> dict[str, float]:
    names = ("loss", "correct", "margin", "tokens", "pairs", "grad_norm", "steps", "since")
    return dict.fromkeys(names, 0.0)
