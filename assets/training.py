"""The training side of the graph: backbone, pre-trained reward model, fine-tuned ones."""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import dagster as dg
import pyarrow as pa

from assets import plots
from assets.digests import digest
from assets.home import PROJECT
from assets.results import AUTHOR, made, progress_of, table_link
from assets.stages import asset_kwargs, stage_making
from assets.staleness import provenance
from assets.workspace import Workspace
from pipelines import ids, schemas
from pipelines.lake import Upsert


def checkpoint_id(
    workspace: Workspace, instance: dg.DagsterInstance, name: str, parent: str | None
) -> bytes:
    """Hash of what a checkpoint is made from: its stage's provenance and its parent."""
    made_from = provenance(workspace, instance, stage_making(workspace, name))
    return ids.content_id("checkpoint", workspace.config.name, name, parent, digest(made_from))


def read_checkpoint_id(folder: Path) -> str:
    """The id that a finished checkpoint's folder carries."""
    return (folder / "checkpoint_id").read_text(encoding="utf-8").strip()


def git_revision() -> str | None:
    """The project's commit, where it runs from a git checkout."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def publish_checkpoint(
    workspace: Workspace,
    name: str,
    key: bytes,
    stage: str,
    parent: str | None,
    configuration: Any,
    metrics: dict[str, Any],
) -> None:
    """Write the checkpoint's row, and its id into its folder."""
    folder = workspace.checkpoint(name)
    (folder / "checkpoint_id").write_text(ids.text(key) + "\n", encoding="utf-8")
    with workspace.lake() as lake:
        row = {
            "checkpoint_id": ids.array([key]),
            "name": [name],
            "stage": [stage],
            "parent": ids.array([ids.from_text(parent) if parent else None]),
            "snapshot": [groups_snapshot(workspace)],
            "configuration": [configuration.model_dump_json()],
            "path": [str(folder.relative_to(workspace.home))],
            "metrics": [json.dumps(metrics, default=str)],
            "git_revision": [git_revision()],
            "created_at": [datetime.now(UTC)],
        }
        schema = schemas.CHECKPOINTS.schema
        table = pa.table(
            [
                column if isinstance(column, pa.Array) else pa.array(column, schema.field(n).type)
                for n, column in row.items()
            ],
            schema=schema,
        )
        lake.publish(
            AUTHOR, f"checkpoint {workspace.config.name}/{name}", [Upsert("checkpoints", table)]
        )


def loss_curve(name: str, lines: list[dict[str, Any]]) -> dg.MarkdownMetadataValue:
    """The losses of a training run, from the lines of its log."""
    steps, losses = ([line[of] for line in lines] for of in ("step", "loss"))
    return plots.curve(f"{name}: loss by step", steps, losses)


def groups_snapshot(workspace: Workspace) -> int | None:
    """The lake snapshot that shows this configuration's groups and all that they name."""
    path = workspace.groups_file("pretrain", "train").with_name("snapshot")
    return int(path.read_text(encoding="utf-8")) if path.exists() else None


@dg.asset(
    **asset_kwargs("backbone"),
    pool="training",
    description="A small decoder with next-token training on the training answers, to start from.",
)
def backbone(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """Documents put two answers of one policy side by side, so that comparing pays."""
    import torch

    from trainer.data import read_groups
    from trainer.language_model import documents_from_groups, train, train_tokenizer
    from trainer.resume import read_log

    torch.set_num_threads(workspace.config.threads)
    settings, out = workspace.config.backbone, workspace.checkpoint("backbone")
    key = checkpoint_id(workspace, context.instance, "backbone", None)
    _make_room(out, key)
    files = [workspace.groups_file(wrapper, "train") for wrapper in ("pretrain", "sft")]
    documents = documents_from_groups(read_groups(files))[: settings.max_documents]
    texts = [part for d in documents for part in ((d,) if isinstance(d, str) else d)]
    tokenizer = train_tokenizer(
        texts[: settings.tokenizer_texts],
        settings.vocabulary,
        workspace.work_dir / "tokenizer",
        context=settings.model.context,
    )
    metrics = train(documents, tokenizer, out, settings.model, progress_of(context, workspace))
    publish_checkpoint(workspace, "backbone", key, "language_model", None, settings, metrics)
    return made(
        context,
        workspace,
        {
            "documents": len(documents),
            "loss (nats per token)": metrics["loss"],
            "parameters": int(metrics["parameters"]),
            "seconds": metrics["seconds"],
            "loss curve": loss_curve("backbone", read_log(out)),
            "folder": dg.MetadataValue.path(str(out)),
            **table_link("checkpoints"),
        },
    )


def _make_room(out: Path, key: bytes) -> None:
    """Empty a folder of what other checkpoints left there; what ours left is gone on with."""
    from trainer.resume import emptied

    mark = out / "making"
    if not mark.exists() or mark.read_text(encoding="utf-8") != ids.text(key):
        emptied(out)
        mark.write_text(ids.text(key), encoding="utf-8")


def _reward_model(
    context: dg.AssetExecutionContext,
    workspace: Workspace,
    *,
    start: str,
    stage: Literal["pretrain", "finetune"],
) -> dg.MaterializeResult:
    """Train the asset's reward model from the checkpoint of another asset."""
    import torch

    from trainer.loop import train

    torch.set_num_threads(workspace.config.threads)
    name = context.asset_key.to_user_string()
    settings = getattr(workspace.config, stage)
    out = workspace.checkpoint(name)
    if idle := stage_making(workspace, name).idle(workspace):
        raise dg.Failure(idle)
    parent = read_checkpoint_id(workspace.checkpoint(start))
    key = checkpoint_id(workspace, context.instance, name, parent)
    _make_room(out, key)
    wrapper = "pretrain" if stage == "pretrain" else "sft"
    metrics = train(
        [workspace.groups_file(wrapper, "train")],
        workspace.checkpoint(start),
        out,
        settings,
        stage=stage,
        parents=[parent],
        snapshot=groups_snapshot(workspace),
        checkpoint_id=ids.text(key),
        cache=workspace.home / "cache",
        progress=progress_of(context, workspace),
    )
    curve = metrics.pop("curve", [])
    publish_checkpoint(workspace, name, key, stage, parent, settings, metrics)
    numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
    return made(
        context,
        workspace,
        {
            **numbers,
            "loss curve": loss_curve(name, curve),
            "folder": dg.MetadataValue.path(str(out)),
            **table_link("checkpoints"),
        },
    )


@dg.asset(
    **asset_kwargs("pretrained"),
    pool="training",
    description="POLAR pre-training: which answer is of the reference's policy?",
)
def pretrained(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """The policy discriminator."""
    return _reward_model(context, workspace, start="backbone", stage="pretrain")


@dg.asset(
    **asset_kwargs("finetuned"),
    pool="training",
    description="The pre-trained reward model, fine-tuned on ranked answers.",
)
def finetuned(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """Pre-training, then fine-tuning."""
    return _reward_model(context, workspace, start="pretrained", stage="finetune")


@dg.asset(
    **asset_kwargs("finetuned_alone"),
    pool="training",
    description="The backbone fine-tuned on the same ranked answers without pre-training, to "
    "compare with.",
)
def finetuned_alone(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """Fine-tuning alone."""
    return _reward_model(context, workspace, start="backbone", stage="finetune")


ASSETS = [backbone, pretrained, finetuned, finetuned_alone]
