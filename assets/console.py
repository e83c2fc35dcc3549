"""What the terminal shows of a run: the plan, bars with ETA, and the summary at the end."""

from __future__ import annotations

import json
import time
from typing import Any

import dagster as dg
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)
from rich.table import Table

from assets.plan import prompts_of
from assets.progress import Progress, duration, progress_line
from assets.run import Item, Outcome, execute, plan
from assets.workspace import Workspace
from pipelines.attach import CATALOG
from trainer.settings import TrainSettings

console = Console()


class TerminalListener:
    """Bars in a terminal; a line every few seconds where output goes to a file."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self.bars: Bars | None = None

    def start(self, item: Item) -> Progress:
        """Open the item's bar."""
        if not self.out.is_terminal:
            self.out.print(f"{item.title} ... ({item.reason})", highlight=False, soft_wrap=True)
            return self._lines(item)
        bars = Bars(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.out,
            transient=True,
        )
        task = bars.add_task(item.title, total=None, note=item.reason)
        bars.start()
        self.bars = bars

        def report(done: int, total: int, note: str = "") -> None:
            bars.update(task, completed=done, total=total, note=note)

        return report

    def _lines(self, item: Item) -> Progress:
        start = last = time.monotonic()

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= 10:
                last = now
                line = progress_line(done, total, now - start, note)
                self.out.print(f"  {item.title}: {line}", highlight=False, soft_wrap=True)

        return report

    def finish(self, item: Item, seconds: float, error: str | None) -> None:
        """Close the bar and leave one line."""
        self.close()
        state = "failed" if error else "made"
        self.out.print(f"{item.title:<34} {state} in {duration(seconds)}", highlight=False)
        if error:
            self.out.print(f"  {error}", markup=False, highlight=False, soft_wrap=True)

    def wait(self, note: str) -> None:
        """Say that another run is in the way."""
        self.out.print(note, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take an open bar away."""
        if self.bars:
            self.bars.stop()
            self.bars = None


def run_command(workspace: Workspace, until: str | None, *, as_json: bool) -> bool:
    """Run what is stale and print the summary; whether all went well."""
    from assets.definitions import build_definitions

    out = Console(stderr=as_json)
    start = time.monotonic()
    listener = TerminalListener(out)
    with dg.DagsterInstance.get() as instance:
        try:
            outcome = execute(
                workspace,
                instance,
                build_definitions(workspace),
                until=until,
                listener=listener,
            )
        finally:
            listener.close()
    if not outcome.made and outcome.ok:
        out.print("All is current: nothing to make, no run started.")
    summary = summarise(workspace)
    if as_json:
        print(json.dumps(_outcome_json(outcome) | summary, default=str))
    else:
        print_summary(out, workspace, summary, outcome, time.monotonic() - start)
    return outcome.ok


def dry_run_command(workspace: Workspace, until: str | None, *, as_json: bool) -> None:
    """Print the plan: what is stale, why, and how much work it is."""
    with dg.DagsterInstance.get() as instance:
        items = plan(workspace, instance, until)
    sizes = work_sizes(workspace)
    rows = [
        {
            "asset": item.stage.name,
            "partition": item.partition,
            "reason": item.reason,
            "size": sizes.get(item.stage.name, ""),
        }
        for item in items
    ]
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        console.print("All is current: a run would make nothing.")
        return
    table = Table("asset", "reason", "size", title="Would be made, in this order")
    merged: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        key = (str(row["asset"]), str(row["reason"]), str(row["size"]))
        merged.setdefault(key, []).append(str(row["partition"] or ""))
    for (asset, reason, size), partitions in merged.items():
        title = f"{asset} ({len(partitions)} policies)" if partitions[0] else asset
        table.add_row(title, reason, size)
    console.print(table)


def work_sizes(workspace: Workspace) -> dict[str, str]:
    """How much each stage has to do, as far as the configuration and files tell."""
    config = workspace.config
    if config.is_recorded:
        from pipelines.engines.recorded import row_counts

        files = row_counts(workspace.recorded_data())
        sizes = {"recorded": ", ".join(f"{n:,} {name}" for name, n in files.items())}
    else:
        sizes = _pool_sizes(workspace)
    return sizes | {
        "backbone": f"{config.backbone.model.steps:,} steps",
        "pretrained": _length(config.pretrain),
        "finetuned": _length(config.finetune),
        "finetuned_alone": _length(config.finetune),
        "scaling": f"{len(workspace.scaling.runs)} training runs" if config.scaling else "",
    }


def _pool_sizes(workspace: Workspace) -> dict[str, str]:
    from pipelines import rollouts

    config, policies = workspace.config, workspace.pool.policies
    asked = prompts_of(workspace)
    runs = len(workspace.embedded.runs) if workspace.embedded else 0
    wanted = sum(
        asked[str(rollouts.answers({"kind": policy.kind, "template": policy.template}))]
        for policy in policies
    )
    if config.rollouts.assignment == "sparse":
        wanted = min(wanted, asked.total() * config.rollouts.policies_per_prompt)
    return {
        "embedded_policies": f"{runs} training runs",
        "policies": f"{len(policies)} policies",
        "prompts": f"{asked.total():,} prompts",
        "trajectories": f"at most {wanted * config.rollouts.samples:,} answers in all",
    }


def _length(settings: TrainSettings) -> str:
    ends = [
        f"{settings.epochs} epochs",
        f"{settings.max_steps:,} steps" if settings.max_steps else "",
        f"{settings.max_seconds:.0f} s" if settings.max_seconds else "",
    ]
    return "at most " + ", ".join(filter(None, ends))


def summarise(workspace: Workspace) -> dict[str, Any]:
    """Rows per table, metrics with intervals and rulers, and where things are."""
    catalog = workspace.home / CATALOG
    if not catalog.exists():
        return {"home": str(workspace.home)}
    with workspace.lake(read_only=True) as lake:
        rows = lake.row_counts()
        metrics = lake.query(_METRICS, [str(workspace.config.name)]).to_pylist()
        quarantined = lake.query(
            "select source, sum(rows)::bigint as rows from counts "
            "where what = 'quarantined' group by 1 having sum(rows) > 0"
        ).to_pylist()
    report = workspace.report_dir / "report.html"
    scaling = workspace.scaling_dir / "report.html"
    return {
        "home": str(workspace.home),
        "lake": str(catalog),
        "report": str(report) if report.exists() else None,
        "scaling": str(scaling) if scaling.exists() else None,
        "rows": rows,
        "metrics": metrics,
        "quarantined": quarantined,
        "unavailable": {} if workspace.config.is_recorded else workspace.policies_now()[1],
    }


_METRICS = """
select c.name as checkpoint, e.suite, e.cell, e.category, e.scorer, e.value, e.low, e.high, e.n
from evaluations e
join checkpoints c using (checkpoint_id)
where e.metric = 'accuracy' and c.path like 'checkpoints/' || ? || '/%'
    and (e.category = 'all' or e.category = 'siblings')
order by e.suite desc, e.category, e.cell, e.scorer <> 'model', e.value desc
"""


def print_summary(
    out: Console,
    workspace: Workspace,
    summary: dict[str, Any],
    outcome: Outcome,
    seconds: float,
) -> None:
    """The closing lines of a run."""
    if summary.get("rows"):
        table = Table("table", "rows", title="Lake")
        for name, rows in summary["rows"].items():
            table.add_row(name, f"{rows:,}")
        out.print(table)
    if summary.get("metrics"):
        out.print(_metrics_table(summary["metrics"]))
    for row in summary.get("quarantined", []):
        out.print(
            f"{row['rows']:,} bad input rows of {row['source']} were set aside: "
            'polar sql "from quarantine"',
            highlight=False,
            soft_wrap=True,
        )
    lacking = [
        f"policy {name} could not answer: {reason}"
        for name, reason in summary.get("unavailable", {}).items()
    ]
    lacking += [
        f"not made: {item.title}: {error.splitlines()[0]}" for item, error in outcome.failed
    ]
    for line in lacking:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    for label in ("report", "scaling", "lake"):
        if summary.get(label):
            out.print(f"{label + ':':<8} {summary[label]}", highlight=False, soft_wrap=True)
    out.print(f"took:    {duration(seconds)}", highlight=False)


def _metrics_table(metrics: list[dict[str, Any]]) -> Table:
    """One line per suite and cell: the model, then its best ruler."""
    table = Table(
        "suite", "cell", "category", "n", "model [95 %]", "best ruler [95 %]", title="Evaluation"
    )
    cells: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in metrics:
        key = (row["suite"], row["cell"], row["category"], row["checkpoint"])
        cells.setdefault(key, []).append(row)
    for (suite, cell, category, _), rows in cells.items():
        models = [row for row in rows if row["scorer"] == "model"]
        rulers = [row for row in rows if row["scorer"] not in _MODELS]
        if not models:
            continue
        best = max(rulers, key=lambda row: row["value"], default=None)
        table.add_row(
            suite,
            cell,
            category,
            f"{models[0]['n']:,}",
            _interval(models[0]),
            f"{best['scorer']} {_interval(best)}" if best else "",
        )
    return table


_MODELS = {"model", "without_pretraining", "pretrained_only"}


def _interval(row: dict[str, Any]) -> str:
    if row["low"] is None:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "made": [item.title for item in outcome.made],
        "failed": {item.title: error for item, error in outcome.failed},
    }


def similar_command(workspace: Workspace, text: str, top: int, *, as_json: bool) -> None:
    """Print the trajectories nearest to a text."""
    from assets.corpus import find_similar

    rows = find_similar(workspace, text, top)
    if as_json:
        for row in rows:
            print(json.dumps(row, default=str))
        return
    if not rows:
        console.print("No near-duplicate found.")
        return
    table = Table("similarity", "trajectory", "policy", "text")
    for row in rows:
        excerpt = " ".join(row["text"].split())[:80]
        table.add_row(f"{row['similarity']:.2f}", row["trajectory_id"], row["policy"], excerpt)
    console.print(table)
