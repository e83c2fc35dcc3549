"""Training: groups in, a checkpoint out; stop it at any step and it goes on with the same numbers.

    OMP_NUM_THREADS=2 python -m trainer pretrain --groups groups.parquet --start LM --out DIR

The order of groups is a function of (seed, epoch), and each step of its number, so a run resumes
from weights, optimiser state and step alone. While it runs, `out/resume/step-N` is a complete
checkpoint; at the end the model lies in `out` itself, beside `metrics.jsonl` and `training.json`.

Under torchrun every process takes a share of each step's groups; see `distributed`.

What a step computes belongs to `step`; saving and finding a run to `resume`; what a line of the log
says to `metrics`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from trainer import distributed, lora, resume
from trainer.distributed import World
from trainer.errors import BadGroupsError, DivergedError, ResumeError
from trainer.ids_cache import cached_ids
from trainer.metrics import EventFiles, Work, line_of, no_sums
from trainer.model import RewardModel, Stage
from trainer.optim import learning_rate
from trainer.packing import Ids, Progress, batches
from trainer.settings import TrainSettings
from trainer.step import NotFiniteError, Stepper, check_layout
from trainer.stopping import held_back
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
    cache: Path | None = None,
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
        cache: a folder to keep token ids in for other runs too; else they are kept until this
            run ends.
        progress: called at most a few times a second with thousandths done, 1000, and a note.

    Returns:
        Steps, epochs, groups, pairs, tokens (as separate sequences would have), seconds, loss and
        accuracy of the last interval, `curve` (the lines of metrics.jsonl), and `counts` of groups.

    Raises:
        BadGroupsError: the groups cannot be read, or none can be learned from.
        BadCheckpointError: `start` cannot be used.
        ResumeError: `out` holds another run, one that cannot be gone on with, one that goes on, or
            `start` itself.
        LayoutError: the layout does not give the scores of separate sequences.
        DivergedError: the loss or the gradient is not finite.
    """
    out = Path(out)
    origin = Path(start).resolve()
    if out.resolve() == origin or (out / "resume").resolve() in origin.parents:
        msg = f"{out}: the weights to start from lie there and would be lost; choose another folder"
        raise ResumeError(msg)
    chosen = {"parents": tuple(parents), "snapshot": snapshot, "checkpoint_id": checkpoint_id}
    with distributed.world() as here, resume.only_trainer(out) if here.first else nullcontext():
        if not here.first:
            progress = None
        here.wait()  # until the first process holds the folder
        return _train(
            groups, Path(start), out, settings, stage, chosen, split, cache, progress, here
        )


def _train(
    groups: Sequence[Path],
    start: Path,
    out: Path,
    settings: TrainSettings,
    stage: Stage,
    changes: dict[str, Any],
    split: str,
    cache: Path | None,
    progress: Progress | None,
    here: World,
) -> dict[str, Any]:
    """What `train` does, in one process of its world."""
    limits = None
    if settings.max_length is not None and settings.max_response_length is not None:
        limits = Limits(settings.max_length, settings.max_response_length)
    model = RewardModel.start(start, wrapper=WRAPPERS[stage], limits=limits)
    if cache is None and not (out / resume.DONE).is_file():
        cache = out / "resume"
    for turn in (here.first, not here.first):  # the others find what the first one made
        if turn:
            ids, counts = cached_ids(groups, model.template, cache, split=split, progress=progress)
        here.wait()
    if not len(ids):
        msg = f"no group of split {split!r} to train on in {', '.join(map(str, groups))}: {counts}"
        raise BadGroupsError(msg)
    identity = resume.identity(settings, stage, start, ids)
    finished = resume.finished(out, identity)
    if finished is not None:
        return finished
    restored, state = resume.restore(out, identity) or (model, {})
    if settings.lora:  # what was saved is merged; adapters go on from where training started
        adapters = state.pop("adapters", None)
        lora.attach(model.network, settings.lora, seed=settings.seed, state=adapters)
    else:
        model = restored
    record = model.record.model_copy(update={**changes, "stage": stage})
    model = RewardModel(model.network, model.tokenizer, record).place()
    run = _Run(model, ids, out, settings, identity, progress, here)
    run.go(state)
    weights = run.weights()
    summary = run.summary(counts)
    here.wait()
    if here.first:
        if settings.lora and settings.lora.keep:
            lora.save(model.network, settings.lora, start, out / lora.FOLDER)
        resume.finish(out, model, identity, summary, weights)
    here.wait()
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
        here: World,
    ) -> None:
        self.model, self.ids, self.out, self.here = model, ids, out, here
        self.settings, self.identity, self.progress = settings, identity, progress
        self.lengths = ids.lengths()
        self.epoch_steps = len(self._plan(0))
        limit = settings.max_steps or math.inf
        self.total = int(min(settings.epochs * self.epoch_steps, limit))
        self.step, self.elapsed, self.pairs, self.tokens = 0, 0.0, 0, 0
        self.saved: int | None = None
        self.interval, self.last = no_sums(), no_sums() | {"accuracy": 0.0, "pairs_per_s": 0.0}
        check_layout(model, ids, settings.layout, self._plan(0)[0])
        self.work = Work(model.network)
        self.steps = Stepper(model, ids, settings, here)

    def go(self, state: dict[str, Any]) -> None:
        """Run from `state` (empty for a new run) to the end, logging and saving on the way."""
        if state:
            distributed.load_optimiser(self.steps.optimiser, state.pop("optimiser"))
            vars(self).update(state)
            self.interval = no_sums() | self.interval
            self.saved = self.step
        if self.here.first:
            resume.trim_log(self.out, self.step)
        writes = self.here.first and self.settings.tensorboard
        alone = self.here.size == 1  # several cannot save unless all of them do
        written = closing(EventFiles(self.out, self.step)) if writes else nullcontext()
        with written as events, held_back(alone) as stopped:
            self._go(events, stopped)

    def _go(self, events: EventFiles | None, stopped: Callable[[], bool]) -> None:
        self.model.network.train()
        clock, saved, told = time.perf_counter() - self.elapsed, self.elapsed, 0.0
        plan, planned = self._plan(0), 0
        while self.step < self.total and self._done() < 1:
            epoch, index = divmod(self.step, self.epoch_steps)
            if epoch != planned:
                plan, planned = self._plan(epoch), epoch
            self._take_step(plan[index])
            self.elapsed = self.here.agreed(time.perf_counter() - clock)
            if self.step % self.settings.log_every == 0 or self.step == self.total:
                self._write_interval(events)
            if self.progress and self.elapsed - told > 0.3:
                told = self.elapsed
                self.progress(round(1000 * self._done()), 1000, self._note())
            if stopped():
                self._save()
                return
            if self.elapsed - saved > self.settings.save_seconds and self.step < self.total:
                self._save()
                saved = self.elapsed
        if self.interval["pairs"]:
            self._write_interval(events)
        if self.progress:
            self.progress(1000, 1000, self._note())

    def _save(self) -> None:
        """Save, unless the last step has spoilt the weights: the next one will say so."""
        if not distributed.all_finite(self.model.network, self.here):
            return
        weights, state = self.weights(), self.state()
        if self.here.first:
            resume.save(self.out, self.model, state, self.identity, weights)
        self.saved = self.step
        self.here.wait()

    def weights(self) -> dict[str, Any] | None:
        """All weights, where no process holds them all; None where each does."""
        if self.here.size == 1 or self.settings.strategy == "ddp":
            return None
        return distributed.whole(self.model.network.state_dict())

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs beside the weights."""
        names = ("step", "elapsed", "pairs", "tokens", "interval")
        return {
            "optimiser": distributed.whole(self.steps.optimiser.state_dict()),
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
        rate = learning_rate(max((self.step + 1) / self.total, self._done()), self.settings)
        try:
            totals = self.steps.take(batch, self.step, rate)
        except NotFiniteError as fault:
            self._diverged(fault)
        self.step += 1
        self.pairs += int(totals["pairs"])
        self.tokens += int(totals["tokens"])
        for key, value in (totals | {"steps": 1}).items():
            self.interval[key] += value

    def _diverged(self, fault: NotFiniteError) -> NoReturn:
        """Save the weights of before this step, and say what can be done."""
        if self.step and self.step != self.saved:
            self._save()
        kept = resume.newest(self.out)
        names, more = ", ".join(fault.groups[:5]), len(fault.groups) - 5
        where = f"{names} and {more} more" if more > 0 else names
        way_on = (
            f"{kept} holds the last good weights: give it as the start of a run in another folder"
            if kept
            else f"Nothing good was saved; remove {self.out} to train again with other settings"
        )
        msg = (
            f"step {self.step + 1}: loss {fault.loss}, gradient norm {fault.norm}, in groups "
            f"{where}; lower lr (now {self.settings.lr}) or clip, or train in fp32. {way_on}"
        )
        raise DivergedError(msg) from fault

    def _write_interval(self, events: EventFiles | None) -> None:
        sums, self.interval = self.interval, no_sums()
        self.interval["since"] = self.elapsed
        line = {
            "step": self.step,
            "epoch": round(self.step / self.epoch_steps, 4),
            "seconds": round(self.elapsed, 3),
            "lr": self.steps.optimiser.param_groups[0]["lr"],
            "pairs": self.pairs,
            **line_of(sums, self.elapsed - sums["since"], self.work),
        }
        self.last = line
        if self.here.first:
            resume.append_log(self.out, line)
        if events:
            events.write(line)

    def _note(self) -> str:
        """What the console says: of the interval that goes on, or else of the last one."""
        sums = self.interval
        line = self.last
        if sums["pairs"]:
            line = line_of(sums, self.elapsed - sums["since"], self.work)
        return (
            f"step {self.step}, loss {line['loss']:.3f}, accuracy {line['accuracy']:.3f}, "
            f"margin {line['margin']:.2f}, {line['pairs_per_s']:.0f} pairs/s"
        )
