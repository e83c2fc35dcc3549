"""The asset `scaling`: trains every run of a plan and fits power laws to their losses.

`polar run --until scaling`, or the asset's button in the UI; a whole run does not make it.
"""

from datetime import UTC, datetime
from typing import Any

import dagster as dg
import pyarrow as pa

from assets import plots
from assets.digests import code_digest, digest
from assets.results import made, progress_of, table_link
from assets.stages import asset_kwargs, stage_making
from assets.staleness import fingerprint_of
from assets.training import git_revision, groups_snapshot, publish_checkpoint
from assets.workspace import Workspace
from pipelines import ids, schemas
from pipelines.lake import Replace
from trainer.report import ReportContext
from trainer.scaling import Run, Scaling, scaling
from trainer.scaling_report import laws_of, runs_of, write_scaling_report

TRAINING = ("trainer.loop", "trainer.language_model")  # code that decides what a run becomes


def run_key(workspace: Workspace, instance: dg.DagsterInstance, run: Run) -> bytes:
    """The checkpoint id of a run: a hash of its own settings, of the groups and of the code.

    Other runs of the plan are no part of it, so a plan that grows leaves what was trained.
    """
    plan = workspace.scaling
    groups = fingerprint_of(workspace, instance, stage_making(workspace, "groups"))
    common = [plan.vocabulary, plan.documents, groups, code_digest(TRAINING)]
    made_from = [run.language, run.pretrain, *common]
    return ids.content_id("checkpoint", workspace.config.name, _name(run), None, digest(made_from))


def _name(run: Run) -> str:
    return f"scaling/{run.name}"


@dg.asset(
    **asset_kwargs("scaling"),
    name="scaling",
    pool="training",
    description="Trains decoders of several sizes as the plan of the configuration says and fits "
    "power laws of held-out loss over weights and over compute. Made only when asked for: minutes "
    "to hours. Stopped, it goes on where it was.",
)
def scaling_laws(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """All runs of the plan, their losses on the same held-out pairs, and the laws."""
    import torch

    from trainer.plots import scaling_figure
    from trainer.scaling_runs import finished, measure, read_corpus, shares_of, train_run

    torch.set_num_threads(workspace.config.threads)
    plan = workspace.scaling
    corpus = read_corpus(
        plan,
        workspace.groups_file("pretrain", "train"),
        workspace.groups_file("pretrain", "eval"),
        workspace.work_dir / "scaling-tokenizer",
        snapshot=groups_snapshot(workspace),
        cache=workspace.home / "cache",
    )
    keys = {run.name: run_key(workspace, context.instance, run) for run in plan.runs}
    folders = {run.name: workspace.checkpoint(_name(run)) for run in plan.runs}
    left = [run for run in plan.runs if not finished(folders[run.name], ids.text(keys[run.name]))]
    context.log.info(f"{len(left)} of {len(plan.runs)} runs are to be trained")
    told = shares_of(left, progress_of(context, workspace))
    results = {}
    for run in plan.runs:
        key, folder = keys[run.name], folders[run.name]
        summary = train_run(run, corpus, folder, ids.text(key), told.get(run.name))
        if not (folder / "checkpoint_id").exists():
            numbers = {k: v for k, v in summary.items() if k != "curve"}
            publish_checkpoint(workspace, _name(run), key, "pretrain", None, run.size, numbers)
        results[run.name] = measure(summary, corpus, folder)
    pairs = corpus.pairs
    fitted = scaling(plan, results, pairs.prompt, pairs.policy)
    paths = write_scaling_report(workspace.scaling_dir, fitted, _context(workspace))
    _publish(workspace, fitted, keys)
    runs = runs_of(fitted)
    metadata: dict[str, Any] = {
        "report": dg.MetadataValue.path(str(paths["html"])),
        "open": dg.MetadataValue.url(paths["html"].resolve().as_uri()),
        "loss": plots.picture("loss on held-out pairs", scaling_figure(fitted)),
        "laws": plots.table(
            [{k: v for k, v in law.items() if k != "variable"} for law in laws_of(fitted)]
        ),
        "runs": plots.table([row | {"C": f"{row['C']:.3g}"} for row in runs]),
        **{f"R2 of {fit.form}": fit.law.r2 for fit in fitted.fits},
        **table_link("evaluations", "from evaluations where suite = 'scaling'"),
    }
    return made(context, workspace, metadata)


def _context(workspace: Workspace) -> ReportContext:
    data = " --data FOLDER" if workspace.config.is_recorded else ""
    return ReportContext(
        title=f"POLAR scaling laws: {workspace.config.name}",
        snapshot=groups_snapshot(workspace),
        configuration=digest(workspace.scaling),
        git_revision=git_revision(),
        command=f"polar run --config {workspace.config_path.name}{data} --until scaling",
    )


def _publish(workspace: Workspace, fitted: Scaling, keys: dict[str, bytes]) -> None:
    """Set the losses of the plan's runs in `evaluations`."""
    means, schema = fitted.means, schemas.EVALUATIONS.schema
    same = {"suite": "scaling", "cell": fitted.plan.cell, "category": "all", "metric": "loss"}
    same |= {"scorer": "model"}
    now, snapshot = datetime.now(UTC), groups_snapshot(workspace)
    rows: list[dict[str, Any]] = [
        {
            **same,
            "value": mean.value,
            "low": mean.low,
            "high": mean.high,
            "n": mean.n,
            "clusters": mean.clusters,
            "interval": mean.method,
            "snapshot": snapshot,
            "created_at": now,
        }
        for mean in means.values()
    ]
    known = pa.Table.from_pylist(rows, pa.schema([f for f in schema if f.name in rows[0]]))
    named = ids.array([keys[name] for name in means])
    table = known.add_column(0, "checkpoint_id", named).select(schema.names).cast(schema)
    inside = ", ".join(f"'{ids.text(key)}'" for key in keys.values())
    with workspace.lake() as lake:
        lake.publish(
            "polar",
            f"scaling of {workspace.config.name}: {len(rows)} runs",
            [Replace("evaluations", table, f"checkpoint_id in ({inside})")],
        )


ASSETS = [scaling_laws]
