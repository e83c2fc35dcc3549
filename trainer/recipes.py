"""Published settings by name, and the paper's law for learning rate and batch.

    python -m trainer recipes
    python -m trainer law --parameters 1.8e9 --pretrain-tokens 2.5e12 --reward-tokens 0.94e12

A recipe is a file of `configs/recipes`: values of `TrainSettings`, each with its source beside it.
What the names mean belongs to `settings`. Light to import: no torch here.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import TrainerError

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "recipes"


def names() -> dict[str, str]:
    """Every recipe with the first line of its file, which says what it is."""
    files = sorted(RECIPES.glob("*.yaml"))
    return {f.stem: f.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for f in files}


def recipe_file(name: str) -> Path:
    """The file of a recipe.

    Raises:
        TrainerError: there is no recipe of that name.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        msg = f"unknown recipe {name!r}; {hint}"
        raise TrainerError(msg)
    return RECIPES / f"{name}.yaml"


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What the law gives for a pre-training run."""

    lr: float
    batch: float
    """Samples in a batch, one comparison each; round it."""


def law(*, parameters: float, pretrain_tokens: float, reward_tokens: float) -> Rate:
    """Learning rate and batch of POLAR pre-training (paper, appendix D.1.2).

    LR = 0.0002306 N^0.01125 Dp^-0.66587 Drm^0.33916 and B = 31.9032 N^0.06944 Drm^0.52997. The
    paper says that all sizes are in millions, which does not give its own values; with N in 2^20
    parameters and both D in 2^30 tokens it gives 1.43e-5 and 1940 for POLAR-1.8B, 1.67e-5 and 4343
    for POLAR-7B, as published. It was fitted on 116 to 924 million parameters. The rate belongs to
    this batch: do not rescale it for another one.

    Args:
        parameters: of the model.
        pretrain_tokens: that the language model was trained on which training starts from.
        reward_tokens: of POLAR pre-training.

    Raises:
        TrainerError: a size is not a positive number.
    """
    sizes = {
        "parameters": parameters,
        "pretrain_tokens": pretrain_tokens,
        "reward_tokens": reward_tokens,
    }
    for name, size in sizes.items():
        if not 0 < size < float("inf"):
            msg = f"{name} is {size}; give a positive number, for example 1.8e9"
            raise TrainerError(msg)
    n, dp, drm = parameters / 2**20, pretrain_tokens / 2**30, reward_tokens / 2**30
    return Rate(
        lr=0.0002306 * n**0.01125 * dp**-0.66587 * drm**0.33916,
        batch=31.9032 * n**0.06944 * drm**0.52997,
    )
