"""Guided training: besides ranking candidates, tell what can be measured of them.

A small decoder from scratch learns next to nothing from ranks alone: a rank is one bit for several
hundred ids. Here the state that is scored must also give numbers (say, how far the candidate's
length is from the reference's) and classes (say, whose answers these are), through linear probes
that are thrown away in the end. Both start from a closed-form fit. What is left is a checkpoint
like any other.

What is measured is the caller's; plain training on ranks is `loop`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from trainer import decoder, resume
from trainer.errors import BadGroupsError, DivergedError, LayoutError
from trainer.layout import precision
from trainer.loss import bradley_terry, pairs_of
from trainer.model import RewardModel
from trainer.optim import learning_rate
from trainer.packed import row_of
from trainer.packing import Ids, Progress, batches
from trainer.stopping import held_back
from trainer.template import Limits, Wrapper

_PENALTY = 1.0
"""Of the ridge regression that head and probes start from, for states of deviation 1."""
_SPREAD = 0.05
"""Least deviation that the fit sees: what varies less would get weights that one step upsets."""
_STEEPNESS = 4.0
"""What a share becomes as a difference of scores: about the slope of the logit."""


@dataclass(frozen=True, kw_only=True)
class Guide:
    """What the state of every candidate must tell; rows in the order of the ids' candidates.

    Attributes:
        numbers: (N, F) of mean about 0 and deviation about 1.
        classes: (N, C) labels from 0; -1 is unknown and not learned from.
        sizes: (C,) how many labels each class has.
    """

    numbers: np.ndarray
    classes: np.ndarray
    sizes: tuple[int, ...]


class GuidedSettings(BaseModel):
    """Everything that decides what a guided training computes, and how often it logs and saves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float = Field(default=1e-3, gt=0)
    heads: float = Field(default=1.0, gt=0, description="rate of head and probes, in rates")
    floor: float = Field(default=0.1, ge=0, le=1, description="last rate as a share of lr")
    warmup: float = Field(default=0.03, ge=0, lt=1, description="share of the training")
    weight_decay: float = Field(default=0.05, ge=0)
    clip: float = Field(default=1.0, gt=0)
    epochs: int = Field(default=1, ge=1)
    max_seconds: float | None = Field(
        default=None, gt=0, description="of the processor, for each thread: other work is not in it"
    )
    batch_groups: int = Field(default=4, ge=1)
    ranks: float = Field(default=1.0, ge=0, description="weight of the Bradley-Terry loss")
    numbers: float = Field(default=1.0, ge=0, description="weight of the squared error")
    classes: float = Field(default=0.3, ge=0, description="weight of the cross-entropy")
    first: int = Field(default=200, ge=0, description="groups that head and probes are fitted on")
    until: float = Field(default=1.0, gt=0, description="share after which only ranks count")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    log_every: int = Field(default=20, ge=1)
    save_seconds: float = Field(default=60.0, gt=0)


class _Probes(nn.Module):
    def __init__(self, width: int, guide: Guide) -> None:
        super().__init__()
        self.numbers = nn.Linear(width, guide.numbers.shape[1])
        self.classes = nn.ModuleList(nn.Linear(width, size) for size in guide.sizes)

    def losses(self, states: Tensor, numbers: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error of the numbers, mean cross-entropy of the classes."""
        error = functional.smooth_l1_loss(self.numbers(states), numbers)
        known = [
            functional.cross_entropy(probe(states), classes[:, i], ignore_index=-1)
            for i, probe in enumerate(self.classes)
            if (classes[:, i] >= 0).any()
        ]
        return error, torch.stack(known).mean() if known else error.new_zeros(())


def train_guided(
    ids: Ids,
    guide: Guide,
    start: Path,
    out: Path,
    settings: GuidedSettings,
    *,
    limits: Limits | None = None,
    wrapper: Wrapper = "pretrain",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the reward model of `start` on groups and their guide; leave its checkpoint in `out`.

    The same call goes on where it was stopped. Arguments as in `loop.train`.

    Returns:
        Steps, seconds (as `max_seconds` counts them) and the lines of the log.

    Raises:
        BadGroupsError: there are no groups, or the guide has another number of candidates.
        LayoutError: the network is none that runs over packed rows.
        ResumeError: `out` holds another run.
        DivergedError: the loss is not finite.
    """
    if not len(ids) or len(guide.numbers) != len(ids.ranks):
        msg = f"{len(ids)} groups with {len(ids.ranks)} candidates, {len(guide.numbers)} guides"
        raise BadGroupsError(msg)
    with resume.only_trainer(out):
        identity = resume.identity(settings, "guided", start, ids)
        if (found := resume.finished(out, identity)) is not None:
            return found
        first = RewardModel.start(start, wrapper=wrapper, limits=limits)
        model, state = resume.restore(out, identity) or (first, {})
        if not decoder.ready(model.network):
            msg = f"{type(model.network).__name__} does not run over packed rows"
            raise LayoutError(msg)
        model.record = model.record.model_copy(update={"stage": "pretrain"})
        run = _Run(model, ids, guide, out, settings, identity)
        with held_back() as stopped:
            run.go(state, progress, stopped)
        summary = {"steps": run.step, "seconds": run.elapsed, "curve": resume.read_log(out)}
        resume.finish(out, model, identity, summary)
    return summary


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """Weights (E, F) from standardised states (N, E) to what they should tell (N, F)."""
    penalty = _PENALTY * len(x) * torch.eye(x.shape[1])
    return torch.linalg.solve(x.T @ x + penalty, x.T @ y)


def _seconds() -> float:
    """What this process has used of each of its threads; waiting and being stopped cost nothing."""
    return time.process_time() / torch.get_num_threads()


class _Run:
    def __init__(
        self,
        model: RewardModel,
        ids: Ids,
        guide: Guide,
        out: Path,
        settings: GuidedSettings,
        identity: dict[str, Any],
    ) -> None:
        self.model, self.ids, self.guide, self.out = model, ids, guide, out
        self.settings, self.identity = settings, identity
        self.lengths = ids.lengths()
        self.epoch_steps = len(self._plan(0))
        self.total = settings.epochs * self.epoch_steps
        self.step, self.elapsed = 0, 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.probes = _Probes(model.network.config.hidden_size, guide)
        heads = [cast(nn.Linear, model.network.score).weight, *self.probes.parameters()]
        rest = [p for p in model.network.parameters() if p is not heads[0]]
        groups = [{"params": rest, "times": 1.0}, {"params": heads, "times": settings.heads}]
        self.optimiser = torch.optim.AdamW(
            groups, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
        )
        self.parameters = [*rest, *heads]

    def go(
        self, state: dict[str, Any], progress: Progress | None, stopped: Callable[[], bool]
    ) -> None:
        if state:
            self.optimiser.load_state_dict(state["optimiser"])
            self.probes.load_state_dict(state["probes"])
            self.step, self.elapsed = state["step"], state["elapsed"]
        elif self.settings.first:
            self._fit_heads()
        resume.trim_log(self.out, self.step)
        self.model.network.train()
        clock, saved = _seconds() - self.elapsed, self.elapsed
        sums: dict[str, float] = {}
        plan, planned = self._plan(0), 0
        while self.step < self.total and self._done() < 1:
            epoch, index = divmod(self.step, self.epoch_steps)
            if epoch != planned:
                plan, planned = self._plan(epoch), epoch
            for name, value in self._take_step(plan[index]).items():
                sums[name] = sums.get(name, 0.0) + value
            self.step += 1
            self.elapsed = _seconds() - clock
            if self.step % self.settings.log_every == 0:
                steps = sums.pop("steps")
                line = {name: value / steps for name, value in sums.items()}
                line = {"step": self.step, "seconds": round(self.elapsed, 1), **line}
                resume.append_log(self.out, line)
                if progress:
                    said = ", ".join(f"{name} {line[name]:.3f}" for name in sums)
                    progress(round(1000 * self._done()), 1000, f"step {self.step}, {said}")
                sums = {}
            if stopped() or self.elapsed - saved > self.settings.save_seconds:
                saved = self.elapsed
                resume.save(self.out, self.model, self._state(), self.identity)
            if stopped():
                return

    @torch.no_grad()
    def _fit_heads(self) -> None:
        """Solve for the probes of numbers, and for a head that is all zeros, by ridge regression.

        What tells candidates apart is a small part of the state at first. Gradients take hundreds
        of steps to turn a random readout to it, and until then they teach the layers nothing.
        """
        groups = np.random.default_rng(self.settings.seed).permutation(len(self.ids))
        groups = groups[: self.settings.first]
        rows = [self._rows(g) for g in groups]
        found = [self._states([g]) for g in groups]
        states = torch.cat(found)
        middle, spread = states.mean(0), states.std(0).clamp(min=_SPREAD)
        numbers = torch.from_numpy(self.guide.numbers[np.concatenate(rows)]).float()
        weights = _ridge((states - middle) / spread, numbers - numbers.mean(0)) / spread[:, None]
        self.probes.numbers.weight.copy_(weights.T)
        self.probes.numbers.bias.copy_(numbers.mean(0) - middle @ weights)
        head = cast(nn.Linear, self.model.network.score).weight
        if not head.any():
            inside = torch.cat([x - x.mean(0) for x in found]) / spread
            best = [
                torch.from_numpy(np.equal(r, r.min())) for r in map(self.ids.group_ranks, groups)
            ]
            wanted = torch.cat([b.float() - b.float().mean() for b in best])
            head.copy_(_STEEPNESS * _ridge(inside, wanted[:, None]).T / spread)

    def _rows(self, group: int) -> np.ndarray:
        """The rows of the guide that a group's candidates have."""
        return np.arange(self.ids.first[group] - group, self.ids.first[group + 1] - group - 1)

    def _states(self, batch: Sequence[int] | np.ndarray) -> Tensor:
        """The states (N, E) that are scored, of all candidates of some groups."""
        network = self.model.network
        pieces = [(self.ids.prefix(g), self.ids.suffixes(g)) for g in batch]
        with precision(network, self.settings.precision):
            return decoder.last_hidden(network, row_of(pieces, network.device)).float()

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "elapsed": self.elapsed,
            "optimiser": self.optimiser.state_dict(),
            "probes": self.probes.state_dict(),
        }

    def _plan(self, epoch: int) -> list[np.ndarray]:
        return batches(
            self.lengths, self.settings.batch_groups, seed=self.settings.seed, epoch=epoch
        )

    def _done(self) -> float:
        limit = self.settings.max_seconds
        return max(self.step / self.total, self.elapsed / limit if limit else 0.0)

    def _take_step(self, batch: np.ndarray) -> dict[str, float]:
        ids, settings, network = self.ids, self.settings, self.model.network
        ranks = [ids.group_ranks(g) for g in batch]
        rows = np.concatenate([self._rows(g) for g in batch])
        states = self._states(batch)
        scores = functional.linear(states, cast(nn.Linear, network.score).weight).squeeze(-1)
        found = bradley_terry(scores, ranks)
        pairs = sum(map(pairs_of, ranks))
        told = {"loss": found.loss / pairs}
        loss = settings.ranks * told["loss"]
        if self._done() < settings.until:
            numbers = torch.from_numpy(self.guide.numbers[rows]).float()
            classes = torch.from_numpy(self.guide.classes[rows]).long()
            told["numbers"], told["classes"] = self.probes.losses(states, numbers, classes)
            loss = loss + settings.numbers * told["numbers"] + settings.classes * told["classes"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        if not (math.isfinite(float(loss.detach())) and math.isfinite(float(norm))):
            names = ", ".join(ids.group_ids[g] for g in batch[:5])
            said = f"step {self.step + 1}: loss {float(loss.detach())}"
            msg = f"{said} in the batch with {names}; lower lr"
            raise DivergedError(msg)
        rate = learning_rate(max(self._done(), (self.step + 1) / self.total), settings)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["times"]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        named = {name: float(value.detach()) for name, value in told.items()}
        return named | {"accuracy": found.correct / pairs, "steps": 1.0}
