"""The evaluation side of the graph: held-out groups, rulers beside the models, and the report."""

from datetime import UTC, datetime
from typing import Any

import dagster as dg
import pyarrow as pa

from assets import plots
from assets.results import made, progress_of, table_link
from assets.stages import asset_kwargs
from assets.training import groups_snapshot, read_checkpoint_id
from assets.workspace import Workspace
from pipelines import ids, schemas
from pipelines.lake import Change, Replace

SUITE_CHECKPOINT = {"policy_discrimination": "pretrained", "preference": "finetuned"}


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
    from trainer.report import write_report

    from trainer.data import read_groups
    from trainer.evaluate import evaluate, joined
    from trainer.score import Scorer

    progress = progress_of(context, workspace)
    models = {
        name: Scorer.load(workspace.checkpoint(name)).score
        for name in ("pretrained", "finetuned", "finetuned_alone")
    }
    scorers = {
        "policy_discrimination": {"model": models["pretrained"]},
        "preference": {
            "model": models["finetuned"],
            "without_pretraining": models["finetuned_alone"],
            "pretrained_only": models["pretrained"],
        },
    }
    tables = []
    for suite, wrapper in (("policy_discrimination", "pretrain"), ("preference", "sft")):
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


def publish_rows(workspace: Workspace, rows: pa.Table) -> None:
    """Set the evaluations of this configuration's checkpoints."""
    now, snapshot = datetime.now(UTC), groups_snapshot(workspace)
    keys = {
        suite: read_checkpoint_id(workspace.checkpoint(name))
        for suite, name in SUITE_CHECKPOINT.items()
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
    inside = ", ".join(f"'{key}'" for key in keys.values())
    changes: list[Change] = [Replace("evaluations", table, f"checkpoint_id in ({inside})")]
    with workspace.lake() as lake:
        lake.publish("polar", f"evaluations of {workspace.config.name}", changes)


ASSETS = [report]
