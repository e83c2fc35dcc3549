"""Fine-tuning on ranked answers of one's own: settings that fit them, and what it changed.

The training is `loop`'s, the scores are `score`'s; here is only what a person with twenty rows and
no wish to read about learning rates needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from trainer.data import read_groups
from trainer.errors import BadCheckpointError, BadGroupsError
from trainer.files import read_object
from trainer.packing import Progress
from trainer.settings import TrainSettings, read_settings

STEPS = 50
"""Steps that a small set of rows gets at least, if ten epochs have them."""


def fitting(groups: int, width: int) -> TrainSettings:
    """Settings for this many groups and a model of this width; both rules are ours.

    The rate is the paper's for POLAR-1.8B, 1e-5 at width 2048, and inverse to the width, as wider
    models want smaller steps. The batch grows with the rows, from 4 to the paper's 320; the epochs
    give small sets about fifty steps, ten epochs at most, and large ones the paper's single epoch.
    The floor and the warm-up are the released recipe's; no weight decay pulls on what pre-training
    learned.
    """
    batch = min(max(4, groups // 8), 320)
    epochs = min(max(1, -(-STEPS * batch // groups)), 10)
    return TrainSettings(lr=1e-5 * 2048 / width, batch_groups=batch, epochs=epochs, log_every=1)


@dataclass(frozen=True, kw_only=True)
class Change:
    """Scores of the rows before and after, per row one for each candidate, and their ranks."""

    ranks: list[np.ndarray]
    before: list[np.ndarray]
    after: list[np.ndarray]

    def summary(self) -> dict[str, Any]:
        """Comparisons, and the share won (ties one half) and mean margin before and after."""
        from trainer.loss import pair_indices

        better, worse = pair_indices(self.ranks)
        result: dict[str, Any] = {"comparisons": len(better)}
        for name, scores in (("before", self.before), ("after", self.after)):
            flat = np.concatenate(scores)
            margins = flat[better] - flat[worse]
            won = float(np.mean((margins > 0) + 0.5 * (margins == 0)))
            result[name] = {"accuracy": won, "margin": float(np.mean(margins))}
        return result

    def rows(self) -> list[dict[str, Any]]:
        """Per row the scores of its best and its worst candidate, before and after."""
        return [
            {
                f"{name}_{which}": float(scores[row][pick(ranks)])
                for name, scores in (("before", self.before), ("after", self.after))
                for which, pick in (("chosen", np.argmin), ("rejected", np.argmax))
            }
            for row, ranks in enumerate(self.ranks)
        ]


def finetune_own(
    checkpoint: Path,
    data: Path,
    out: Path,
    *,
    config: Path | None = None,
    words: Sequence[str] = (),
    recipe: str | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Change]:
    """Fine-tune a POLAR checkpoint on ranked answers and score them before and after.

    Args:
        checkpoint: to start from.
        data: groups, Parquet or JSONL, also in the official format.
        out: folder for the new checkpoint; a run that was stopped there goes on.
        config: settings as YAML, over the recipe or what `fitting` gives.
        words: settings as `name=value`, over both.
        recipe: published settings instead of those that `fitting` gives.
        progress: as in `loop.train`.

    Returns:
        What `loop.train` returns, and the change on the rows of split `train`.

    Raises:
        TrainerError: as `loop.train`; a bad line of JSONL is named by its number.
    """
    from trainer.loop import train
    from trainer.model import read_record
    from trainer.score import Scorer

    read_record(Path(checkpoint))
    groups = read_groups([data]).filter(pc.field("split") == "train")
    if not len(groups):
        msg = f"{data}: no rows of split 'train'; a row needs prompt, reference, chosen, rejected"
        raise BadGroupsError(msg)
    base = {} if recipe else fitting(len(groups), _width(Path(checkpoint))).model_dump()
    settings = read_settings(config, words, recipe, base=base)
    before = Scorer.load(checkpoint).score_groups(groups)
    summary = train([data], checkpoint, out, settings, stage="finetune", progress=progress)
    after = Scorer.load(out).score_groups(groups)
    ranks = [
        np.asarray([candidate["rank"] for candidate in row])
        for row in groups.column("candidates").to_pylist()
    ]
    return summary, Change(ranks=ranks, before=before, after=after)


def _width(checkpoint: Path) -> int:
    file = checkpoint / "config.json"
    width = read_object(file, "restore the file").get("hidden_size")
    if not isinstance(width, int):
        msg = f"{file}: hidden_size is {width!r}; give lr yourself, with a --recipe"
        raise BadCheckpointError(msg)
    return width
