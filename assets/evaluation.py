"""The evaluation side of the graph: held-out groups, rulers beside the models, and the report."""

from datetime import UTC, datetime
from typing import Any

import dagster as dg
import pyarrow as pa

from assets import plots
from assets.digests import digest
from assets.results import AUTHOR, made, progress_of, table_link
from assets.stages import asset_kwargs
from assets.training import git_revision, groups_snapshot, read_checkpoint_id
from assets.workspace import Workspace
from pipelines import ids, schemas
from pipelines.labels import sql_list
from pipelines.lake import Change, Replace
from trainer.report import ReportContext, write_report

WRAPPERS = {"policy_discrimination": "pretrain", "preference": "sft"}
LABELS = {
    "policy_discrimination": {"model": "pre-trained"},
    "preference": {
        "model": "pre-trained and fine-tuned",
        "without_pretraining": "fine-tuned alone",
        "pretrained_only": "pre-trained alone",
    },
}


def checkpoints_by_suite(workspace: Workspace) -> dict[str, dict[str, str]]:
    """Per suite, which checkpoint is the model and which are set against it, by scorer name."""
    fine_tuned = (workspace.checkpoint("finetuned") / "config.json").exists()
    compared = {
        "model": "finetuned",
        "without_pretraining": "finetuned_alone",
        "pretrained_only": "pretrained",
    }
    return {
        "policy_discrimination": {"model": "pretrained"},
        "preference": compared if fine_tuned else {"model": "pretrained"},
    }


@dg.asset(
    **asset_kwargs("report"),
    pool="training",
    description="Accuracy on held-out groups, per cell and category, with intervals and the "
    "rulers beside the model; written to `evaluations` and as HTML, Markdown and JSON.",
)
def report(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """Policy discrimination by the pre-trained model, preference by the fine-tuned ones."""
    from trainer.data import read_groups
    from trainer.evaluate import evaluate, joined
    from trainer.score import Scorer

    progress = progress_of(context, workspace)
    scorers = {
        suite: {
            scorer: Scorer.load(workspace.checkpoint(name)).score for scorer, name in of.items()
        }
        for suite, of in checkpoints_by_suite(workspace).items()
    }
    tables = []
    for suite, wrapper in WRAPPERS.items():
        tables.append(
            evaluate(
                scorers[suite],
                read_groups([workspace.groups_file(wrapper, "eval")]),
                read_groups([workspace.groups_file(wrapper, "train")]),
                workspace.config.evaluation,
                progress,
                [suite],
            )
        )
    rows = joined(tables)
    paths = write_report(workspace.report_dir, rows, report_context(workspace))
    publish_rows(workspace, rows)
    shown = [
        row
        for row in rows.to_pylist()
        if row["metric"] == "accuracy" and row["category"] in ("all", "siblings")
    ]
    main = {
        f"{row['suite']}, {row['cell']}, {row['category']}": row["value"]
        for row in shown
        if row["scorer"] == "model"
    }
    return made(
        context,
        workspace,
        {
            "dagster/row_count": rows.num_rows,
            "report": dg.MetadataValue.path(str(paths["html"])),
            "open": dg.MetadataValue.url(paths["html"].resolve().as_uri()),
            "model accuracy": plots.bars("model accuracy", main),
            "numbers": plots.table(
                [
                    {
                        "suite": row["suite"],
                        "cell": row["cell"],
                        "category": row["category"],
                        "scorer": row["scorer"],
                        "value": f"{row['value']:.3f}",
                        "95 %": f"[{row['low']:.3f}, {row['high']:.3f}]",
                        "n": row["n"],
                    }
                    for row in shown
                ]
            ),
            **table_link("evaluations", "from evaluations where metric = 'accuracy'"),
        },
    )


def report_context(workspace: Workspace) -> ReportContext:
    """What the report says beside the numbers: checkpoints, curves, balance, the command."""
    from trainer.resume import read_log

    folders = {
        name: workspace.checkpoint(name)
        for name in ("backbone", "pretrained", "finetuned", "finetuned_alone")
    }
    with workspace.lake(read_only=True) as lake:
        trained = lake.query(
            "select name, stage, checkpoint_id::varchar as id, parent::varchar as parent, "
            "snapshot, path, configuration from checkpoints where path like ? "
            "and name not like 'scaling/%' order by created_at",
            [f"checkpoints/{workspace.config.name}/%"],
        ).to_pylist()
        balance = lake.query(
            "select split, label, sum(rows)::bigint as rows from counts "
            f"where stage = 'pairs' and what = 'out' and source in "
            f"({sql_list(workspace.sources)}) group by all order by all"
        ).to_pylist()
    data = " --data FOLDER" if workspace.config.is_recorded else ""
    return ReportContext(
        title=f"POLAR evaluation: {workspace.config.name}",
        checkpoints=trained,
        snapshot=groups_snapshot(workspace),
        configuration=digest(workspace.config.model_dump(mode="json")),
        git_revision=git_revision(),
        command=f"polar run --config {workspace.config_path.name}{data}",
        labels=LABELS,
        curves={name: lines for name, folder in folders.items() if (lines := read_log(folder))},
        balance=balance,
    )


def publish_rows(workspace: Workspace, rows: pa.Table) -> None:
    """Set the evaluations of this configuration's checkpoints."""
    now, snapshot = datetime.now(UTC), groups_snapshot(workspace)
    keys = {
        suite: read_checkpoint_id(workspace.checkpoint(of["model"]))
        for suite, of in checkpoints_by_suite(workspace).items()
    }
    suites = rows["suite"].to_pylist()
    schema = schemas.EVALUATIONS.schema
    known: dict[str, Any] = {
        "checkpoint_id": ids.array([ids.from_text(keys[suite]) for suite in suites]),
        "snapshot": pa.array([snapshot] * rows.num_rows, pa.int64()),
        "created_at": pa.array([now] * rows.num_rows, schemas.TIME),
    }
    table = pa.table(
        [
            known.get(name, rows[name] if name in rows.column_names else None)
            for name in schema.names
        ],
        schema=schema,
    )
    inside = f"checkpoint_id in ({sql_list([*keys.values()])})"
    changes: list[Change] = [Replace("evaluations", table, inside)]
    with workspace.lake() as lake:
        lake.publish(AUTHOR, f"evaluations of {workspace.config.name}", changes)


ASSETS = [report]
