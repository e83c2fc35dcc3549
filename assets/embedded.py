"""Training the embedded pool: the recipes of `pipelines` handed to the trainer, run by run.

What the recipes say is in `pipelines/embedded.py`, how a decoder is trained in
`trainer/language_model.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

from assets.digests import digest
from assets.progress import Progress
from assets.workspace import Workspace

DONE = "recipe.json"


def train_pool(workspace: Workspace, progress: Progress) -> dict[str, float]:
    """Train every run of the pool's `embedded` section that is not there yet.

    Returns:
        The loss of each run (nats per token).
    """
    import torch

    from pipelines import embedded
    from trainer.language_model import LanguageModelSettings, train, train_tokenizer

    pool = workspace.embedded
    if pool is None:
        return {}
    torch.set_num_threads(workspace.config.threads)
    settings = {run.name: LanguageModelSettings(**pool.settings(run)) for run in pool.runs}
    total = sum(setting.steps for setting in settings.values())
    tokenizer = workspace.policies_dir / "tokenizer"
    recipe = digest({"vocab_size": pool.vocab_size, "texts": embedded.tokenizer_texts()})
    if _finished(tokenizer, recipe) is None:
        context = max(setting.context for setting in settings.values())
        train_tokenizer(embedded.tokenizer_texts(), pool.vocab_size, tokenizer, context=context)
        _finish(tokenizer, recipe, 0.0)
    recipes = {"": recipe}
    losses: dict[str, float] = {}
    done = 0
    for run in pool.runs:
        setting = settings[run.name]
        out = workspace.policies_dir / run.name
        documents = embedded.documents(run)
        parts = [recipes[run.start or ""], setting.model_dump(mode="json"), documents]
        recipes[run.name] = digest(parts)
        loss = _finished(out, recipes[run.name])
        if loss is None:
            before = done

            def step(
                n: int, of: int, note: str, name: str = run.name, before: int = before
            ) -> None:
                progress(before + n, total, f"{name}: {note}")

            start = workspace.policies_dir / run.start if run.start else None
            loss = train(documents, tokenizer, out, setting, step, start)["loss"]
            _finish(out, recipes[run.name], loss)
        losses[run.name] = loss
        done += setting.steps
        progress(done, total, run.name)
    return losses


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
