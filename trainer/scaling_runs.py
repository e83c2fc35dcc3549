"""One run of a scaling plan: a backbone from scratch, POLAR pre-training, losses on held-out pairs.

Which runs there are and what is made of their losses is in `scaling`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer import language_model, loop
from trainer.comparisons import Comparisons, choose, compare
from trainer.data import read_groups
from trainer.errors import BadGroupsError, TrainerError
from trainer.language_model import Document, Progress
from trainer.resume import DONE
from trainer.scaling import Result, Run, ScalingPlan
from trainer.score import Scorer

BACKBONE, MAKING, METRICS = "backbone", "making", "backbone.json"
WHOLE = 1000  # what progress counts to
STEP, IDS = 300_000, 200  # weights that cost what an id costs whatever the size; ids of a group


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What all runs of a plan read.

    Attributes:
        groups: the training groups.
        snapshot: the lake snapshot that they come from.
        documents: what the backbones learn language from.
        tokenizer: the common tokenizer's folder.
        held_out: the pairs whose loss is measured, and those of sibling policies beside them.
        cache: where token ids are kept.
    """

    groups: Path
    snapshot: int | None
    documents: Sequence[Document]
    tokenizer: Path
    held_out: Comparisons
    cache: Path | None

    @property
    def pairs(self) -> Comparisons:
        """The pairs that laws are of: siblings stand apart, as in the evaluation."""
        return self.held_out.only(~self.held_out.sibling)


def read_corpus(
    plan: ScalingPlan,
    train: Path,
    held_out: Path,
    work: Path,
    *,
    snapshot: int | None = None,
    cache: Path | None = None,
) -> Corpus:
    """Documents, tokenizer (made in `work`) and held-out pairs of a plan.

    Raises:
        BadGroupsError: there are no training groups, or no held-out groups of the plan's cell.
    """
    groups = read_groups([train])
    documents = language_model.documents_from_groups(groups)[: plan.documents]
    table = read_groups([held_out])
    rows, _ = choose(table, "pretrain", "eval", len(table) or 1, by_cell=True)
    pairs = compare([row for row in rows if row["cell"] == plan.cell])
    apart = int((~pairs.sibling).sum())
    if not documents or not apart:
        msg = (
            f"{len(documents)} training groups and {apart} held-out pairs of cell "
            f"{plan.cell!r}: a scaling plan needs both; make more answers or name another cell"
        )
        raise BadGroupsError(msg)
    texts = [part for d in documents for part in ((d,) if isinstance(d, str) else d)]
    context = max(size.language.context for size in plan.sizes)
    tokenizer = language_model.train_tokenizer(texts, plan.vocabulary, work, context=context)
    return Corpus(
        groups=train,
        snapshot=snapshot,
        documents=documents,
        tokenizer=tokenizer,
        held_out=pairs,
        cache=cache,
    )


def finished(out: Path, key: str) -> bool:
    """Whether the run with this key has ended in `out`."""
    return _is_of(out, key) and (out / DONE).is_file()


def shares_of(runs: Sequence[Run], progress: Progress) -> dict[str, Progress | None]:
    """By name of each run a progress that counts towards all of them, by expected work."""
    ends = np.cumsum([0.0, *(sum(_work(run)) for run in runs)])
    ends *= WHOLE / max(ends[-1], 1.0)
    return {
        run.name: _within(progress, ends[i], ends[i + 1], f"{run.name}, {i + 1} of {len(runs)}: ")
        for i, run in enumerate(runs)
    }


def _work(run: Run) -> tuple[float, float]:
    """Roughly how long the two trainings of a run take: only to tell what is left."""
    language, weights = run.language, run.size.parameters + STEP
    return (
        float(language.steps * language.batch_tokens * weights),
        float(run.size.groups * IDS * weights),
    )


def _within(
    progress: Progress | None, start: float, end: float, prefix: str = ""
) -> Progress | None:
    """A progress that counts from `start` to `end` of another one's WHOLE."""
    if progress is None:
        return None
    return lambda done, of, note: progress(
        round(start + (end - start) * done / max(of, 1)), WHOLE, prefix + note
    )


def train_run(
    run: Run, corpus: Corpus, out: Path, key: str, progress: Progress | None = None
) -> dict[str, Any]:
    """Train a run's backbone and its reward model, and leave the checkpoint in `out`.

    What a stopped run with the same `key` left is gone on with, and a finished one is not trained
    again; what another run left is removed.

    Returns:
        What `trainer.loop.train` returns, and `language`, what `language_model.train` does.

    Raises:
        TrainerError: the run ended before its budget, or could not be trained.
    """
    if not _is_of(out, key):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        (out / MAKING).write_text(key, encoding="utf-8")
    backbone, (language, pretrain) = out / BACKBONE, _work(run)
    half = WHOLE * language / (language + pretrain)
    if not (backbone / METRICS).is_file():
        metrics = language_model.train(
            corpus.documents,
            corpus.tokenizer,
            backbone,
            run.language,
            _within(progress, 0, half, "language, "),
        )
        (backbone / METRICS).write_text(json.dumps(metrics), encoding="utf-8")
    summary = loop.train(
        [corpus.groups],
        backbone,
        out,
        run.pretrain,
        stage="pretrain",
        snapshot=corpus.snapshot,
        checkpoint_id=key,
        cache=corpus.cache,
        progress=_within(progress, half, WHOLE),
    )
    if summary["steps"] != run.pretrain.max_steps:
        msg = (
            f"{run.name} ended after {summary['steps']} of {run.pretrain.max_steps} steps: "
            f"raise pretrain.epochs (now {run.pretrain.epochs})"
        )
        raise TrainerError(msg)
    return summary | {"language": json.loads((backbone / METRICS).read_text(encoding="utf-8"))}


def measure(summary: dict[str, Any], corpus: Corpus, out: Path) -> Result:
    """A finished run's losses on the held-out pairs, in fp32."""
    pairs, siblings = corpus.held_out, corpus.held_out.sibling
    scores = Scorer.load(out).score(pairs.items)
    losses = np.logaddexp(0.0, -(scores[pairs.winner].astype(float) - scores[pairs.loser]))
    return Result(
        tokens=int(summary["tokens"]),
        language_tokens=int(summary["language"]["tokens"]),
        losses=losses[~siblings],
        accuracy=float(pairs.outcomes(scores)[~siblings].mean()),
        siblings=float(losses[siblings].mean()) if siblings.any() else None,
        seconds=float(summary["seconds"] + summary["language"]["seconds"]),
    )


def _is_of(out: Path, key: str) -> bool:
    mark = out / MAKING
    return mark.is_file() and mark.read_text(encoding="utf-8") == key
