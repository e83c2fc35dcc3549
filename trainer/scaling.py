"""Scaling laws of POLAR pre-training: the plan of runs, and power laws fitted to their losses.

The plan is written down before anything is trained, and a law is fitted to all of its runs or not
at all. How a run is trained is in `scaling_runs`, how laws are shown in `scaling_report`; no torch
here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer import intervals
from trainer.errors import TrainerError
from trainer.language_settings import LanguageModelSettings
from trainer.settings import TrainSettings

SIZES, SPAN, SEEDS = (
    5,
    30.0,
    3,
)  # fewest sizes, narrowest span of compute, seeds of the two smallest
EXPONENTS = np.geomspace(1e-3, 10, 15)  # among which the exponent of a law with a floor is sought
VARIABLES: tuple[Literal["N", "C"], ...] = ("N", "C")
Cell = Literal["seen", "new_policy", "new_prompt", "both_new"]


class Size(BaseModel):
    """One size of decoder, how it is trained, and the seeds that it is trained with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    language: LanguageModelSettings = LanguageModelSettings()
    pretrain: TrainSettings = TrainSettings()

    @model_validator(mode="after")
    def _fixed(self) -> Size:
        if self.pretrain.max_steps is None or self.pretrain.max_seconds is not None:
            msg = f"size {self.name!r}: a budget is fixed by pretrain.max_steps, not by the clock"
            raise ValueError(msg)
        if self.language.hidden % (2 * self.language.heads):
            msg = (
                f"size {self.name!r}: hidden {self.language.hidden} is not a multiple of twice "
                f"its {self.language.heads} heads"
            )
            raise ValueError(msg)
        if len(set(self.seeds)) < len(self.seeds):
            msg = f"size {self.name!r}: a seed is named twice"
            raise ValueError(msg)
        return self

    @property
    def parameters(self) -> int:
        """N: weights of the reward model without its embedding."""
        model = self.language
        layer = 4 * model.hidden**2 + 3 * model.hidden * model.intermediate + 2 * model.hidden
        return model.layers * layer + 2 * model.hidden

    @property
    def groups(self) -> int:
        """Groups that its pre-training reads, repetitions counted."""
        return self.pretrain.batch_groups * (self.pretrain.max_steps or 0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of the plan: a size with one seed."""

    size: Size
    seed: int

    @property
    def name(self) -> str:
        """`size-sSEED`."""
        return f"{self.size.name}-s{self.seed}"

    @property
    def language(self) -> LanguageModelSettings:
        """Next-token training, with the run's seed."""
        return self.size.language.model_copy(update={"seed": self.seed})

    @property
    def pretrain(self) -> TrainSettings:
        """POLAR pre-training, with the run's seed."""
        return self.size.pretrain.model_copy(update={"seed": self.seed})


class ScalingPlan(BaseModel):
    """Sizes and budgets, from the smallest to the largest, fixed before anything is trained.

    `language` and `pretrain` hold for every size that does not say otherwise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocabulary: int = Field(default=2048, ge=300, description="tokens of the common tokenizer")
    documents: int = Field(default=20_000, ge=1, description="at most, to learn language from")
    cell: Cell = Field(default="new_prompt", description="whose held-out pairs the loss is of")
    resamples: int = Field(default=1000, ge=100)
    language: dict[str, Any] = Field(default={}, description="next-token training of every size")
    pretrain: dict[str, Any] = Field(default={}, description="pre-training of every size")
    sizes: tuple[Size, ...]

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, values: Any) -> Any:
        """Give every size what is common to all."""
        if not isinstance(values, dict) or not isinstance(values.get("sizes"), list):
            return values
        sizes = [dict(size) if isinstance(size, dict) else size for size in values["sizes"]]
        for size in sizes:
            for part in ("language", "pretrain"):
                common = values.get(part) or {}
                if isinstance(size, dict) and isinstance(size.get(part, {}), dict):
                    size[part] = {**common, **size.get(part, {})}
        return {**values, "sizes": sizes}

    @model_validator(mode="after")
    def _enough(self) -> ScalingPlan:
        names = [size.name for size in self.sizes]
        weights = [size.parameters for size in self.sizes]
        faults = []
        if len(set(names)) < max(SIZES, len(names)):
            faults.append(f"{len(set(names))} sizes of different names; at least {SIZES} are due")
        if sorted(set(weights)) != weights:
            faults.append(f"sizes are not from the smallest to the largest: {weights} parameters")
        compute = [size.parameters * size.groups for size in self.sizes]
        if compute and max(compute) < SPAN * min(compute):
            factor = max(compute) / min(compute)
            faults.append(f"compute spans a factor of {factor:.3g}; at least {SPAN:g} is due")
        for size in self.sizes[:2]:
            if len(size.seeds) < SEEDS:
                faults.append(f"{size.name} has {len(size.seeds)} seeds; {SEEDS} are due")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def runs(self) -> tuple[Run, ...]:
        """All trainings, the smallest first."""
        return tuple(Run(size=size, seed=seed) for size in self.sizes for seed in size.seeds)


# --- what was measured, and laws ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run cost and how it does on the held-out pairs.

    Attributes:
        tokens: ids of the pre-training, each candidate's sequence whole.
        language_tokens: ids of the next-token training before it.
        losses: (n,) Bradley-Terry loss of each held-out pair, sibling policies' left out.
        accuracy: share of these pairs with the better candidate ahead.
        siblings: mean loss of the held-out pairs of sibling policies; None where there are none.
        seconds: of both trainings.
    """

    tokens: int
    language_tokens: int
    losses: np.ndarray
    accuracy: float
    siblings: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Law:
    """L = a x^-b + floor, as fitted to points (x, L); r2 is that of log L."""

    a: float
    b: float
    floor: float
    r2: float

    def loss(self, x: Any) -> Any:
        """L at x."""
        return self.a * np.asarray(x, float) ** -self.b + self.floor


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law with its bootstrap intervals.

    Attributes:
        variable: N (weights without embedding) or C (operations of the pre-training).
        law: fitted to the mean losses of the sizes.
        ends: 95 % interval of `a`, `b` and `floor`, by name.
        foretold: loss of the largest size by a law fitted to the others alone.
    """

    variable: Literal["N", "C"]
    law: Law
    ends: Mapping[str, tuple[float, float]]
    foretold: float

    @property
    def form(self) -> str:
        """The formula."""
        return f"a {self.variable}^-b" + (" + floor" if "floor" in self.ends else "")


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Everything that the runs of a plan say.

    Attributes:
        plan: what was to be trained.
        results: by run, one for each run of the plan.
        means: by run, the mean loss over the held-out pairs with its clustered interval.
        spread: standard deviation of log loss between seeds of one size.
        fits: N and C, each without and with a floor.
    """

    plan: ScalingPlan
    results: Mapping[str, Result]
    means: Mapping[str, intervals.Interval]
    spread: float
    fits: tuple[Fit, ...]

    def compute(self, run: Run) -> float:
        """C = 6 N D of a run, D its ids of pre-training."""
        return 6.0 * run.size.parameters * self.results[run.name].tokens

    @cached_property
    def points(self) -> list[dict[str, float]]:
        """Per size N, the mean C and the mean loss over its seeds."""
        rows = []
        for size in self.plan.sizes:
            runs = [Run(size=size, seed=seed) for seed in size.seeds]
            rows.append(
                {
                    "N": float(size.parameters),
                    "C": float(np.mean([self.compute(run) for run in runs])),
                    "loss": float(np.mean([self.means[run.name].value for run in runs])),
                }
            )
        return rows


def fit_law(x: np.ndarray, losses: np.ndarray, *, floor: bool) -> Law:
    """The law through points (k,), by least squares of relative errors; all points weigh the same.

    Without a floor that is a straight line of log L over log x. With one, scale and floor follow
    for each exponent from a linear problem that keeps both from being negative, so only the
    exponent is searched for.

    Raises:
        TrainerError: a loss or an x is not a positive number, or there are fewer points than
            unknowns.
    """
    from scipy import optimize, stats

    x, losses = np.asarray(x, float), np.asarray(losses, float)
    points = np.concatenate([x, losses])
    if len(x) < 2 + floor or not (np.isfinite(points).all() and (points > 0).all()):
        msg = f"no power law goes through losses {losses.tolist()} at {x.tolist()}"
        raise TrainerError(msg)
    centre = float(np.exp(np.log(x).mean()))
    along, logs = np.log(x / centre), np.log(losses)
    line = stats.linregress(along, logs)
    if not floor:
        b = -float(line.slope)
        a = math.exp(line.intercept) * centre**b
        return Law(a=a, b=b, floor=0.0, r2=float(line.rvalue**2))

    def parts(b: float) -> tuple[np.ndarray, float]:
        """The best scale and floor for an exponent, and the residual's norm."""
        rows = np.stack([np.exp(-b * along), np.ones_like(along)], axis=1) / losses[:, None]
        return optimize.nnls(rows, np.ones_like(along))

    near = int(np.argmin([parts(b)[1] for b in EXPONENTS]))
    ends = EXPONENTS[max(near - 1, 0)], EXPONENTS[min(near + 1, len(EXPONENTS) - 1)]
    b = float(
        optimize.minimize_scalar(lambda b: parts(b)[1], bounds=ends, options={"xatol": 1e-7}).x
    )
    scale, least = parts(b)[0]
    made = Law(a=float(scale) * centre**b, b=b, floor=float(least), r2=0.0)
    whole = float(((logs - logs.mean()) ** 2).sum())
    left = float(((np.log(made.loss(x)) - logs) ** 2).sum())
    return replace(made, r2=1 - left / whole if whole else 0.0)


def scaling(
    plan: ScalingPlan,
    results: Mapping[str, Result],
    prompts: np.ndarray,
    policies: np.ndarray,
    *,
    seed: int = 0,
) -> Scaling:
    """Fit the laws of a plan to its runs, with intervals.

    A bootstrap draw resamples prompt groups and policy groups of the held-out pairs, the same for
    all runs, and multiplies each run's loss by a draw of the noise between seeds, which is that
    of the sizes with several seeds.

    Args:
        plan: what was to be trained.
        results: by run name, one for every run of the plan, on the same held-out pairs.
        prompts: (n,) prompt group of each held-out pair.
        policies: (n,) policy group of each pair's reference.
        seed: of the draws.

    Raises:
        TrainerError: a run of the plan is missing, one is not of the plan, or the held-out pairs
            are of too few groups for an interval.
    """
    names = [run.name for run in plan.runs]
    missing = [name for name in names if name not in results]
    strange = sorted(set(results) - set(names))
    if missing or strange:
        msg = (
            f"a law is fitted to all runs of its plan: {', '.join(missing) or 'none'} missing, "
            f"{', '.join(strange) or 'none'} not in the plan"
        )
        raise TrainerError(msg)
    columns = np.stack([results[name].losses for name in names], axis=1)
    resampled = intervals.resample(columns, prompts, policies, resamples=plan.resamples, seed=seed)
    if resampled.method == intervals.WILSON:
        msg = f"the {len(columns)} held-out pairs are of one prompt group and one policy group"
        raise TrainerError(msg)
    of_size = np.repeat(np.arange(len(plan.sizes)), [len(size.seeds) for size in plan.sizes])
    spread = _spread(np.log(resampled.means), of_size)
    noise = np.random.default_rng([seed, 2]).normal(0.0, spread, resampled.replicates.shape)
    made = Scaling(
        plan=plan,
        results=results,
        means={name: resampled.mean(i) for i, name in enumerate(names)},
        spread=spread,
        fits=(),
    )
    losses = np.array([point["loss"] for point in made.points])
    draws = _of_sizes(resampled.replicates * np.exp(noise), of_size)
    return replace(
        made,
        fits=tuple(
            _fit(variable, np.array([p[variable] for p in made.points]), losses, draws, floor=floor)
            for variable in VARIABLES
            for floor in (False, True)
        ),
    )


def _fit(
    variable: Literal["N", "C"],
    x: np.ndarray,
    losses: np.ndarray,
    draws: np.ndarray,
    *,
    floor: bool,
) -> Fit:
    drawn = [fit_law(x, draw, floor=floor) for draw in draws]
    names = ("a", "b", "floor") if floor else ("a", "b")
    ends = {
        name: tuple(np.quantile([getattr(law, name) for law in drawn], (0.025, 0.975)).tolist())
        for name in names
    }
    return Fit(
        variable=variable,
        law=fit_law(x, losses, floor=floor),
        ends=ends,
        foretold=float(fit_law(x[:-1], losses[:-1], floor=floor).loss(x[-1])),
    )


def _of_sizes(losses: np.ndarray, of_size: np.ndarray) -> np.ndarray:
    """Means (B, sizes) over the runs of each size; losses are (B, runs)."""
    return np.stack(
        [losses[:, of_size == size].mean(axis=1) for size in range(of_size.max() + 1)], axis=1
    )


def _spread(logs: np.ndarray, of_size: np.ndarray) -> float:
    """Pooled standard deviation of log losses (runs,) within sizes."""
    apart = [logs[of_size == size] for size in range(of_size.max() + 1)]
    squares = sum(float(((part - part.mean()) ** 2).sum()) for part in apart)
    return math.sqrt(squares / sum(len(part) - 1 for part in apart))
