"""The report of an evaluation: HTML that opens without a server, Markdown, and JSON.

The three hold the same numbers. What is said about them is in `verdicts`, how they are drawn in
`plots`, how rows become tables in `report_view`, the pages in `report.html.j2` and `report.md.j2`.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trainer.evaluate import notes_of
from trainer.report_view import checkpoints_view, evaluation_view
from trainer.verdicts import Labels, spoken


@dataclass(frozen=True, kw_only=True)
class ReportContext:
    """What the report says beside the numbers; all of it optional.

    Attributes:
        title: first line.
        checkpoints: what was trained, a mapping of plain values each (name, stage, parents, ...).
        snapshot: lake snapshot that was evaluated on.
        configuration: digest of the configuration.
        git_revision: of the code.
        command: what makes the report again.
        created_at: when; now unless given.
        labels: what scorers are to be called, by suite.
        curves: lines of metrics.jsonl, by training run.
        balance: counts with split, label and rows, such as the lake's `pair_balance`.
        notes: further remarks.
    """

    title: str = "POLAR evaluation"
    checkpoints: Sequence[Mapping[str, Any]] = ()
    snapshot: int | None = None
    configuration: str | None = None
    git_revision: str | None = None
    command: str | None = None
    created_at: datetime | None = None
    labels: Labels = field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    balance: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


def write_report(
    out: Path, rows: pa.Table, context: ReportContext | None = None
) -> dict[str, Path]:
    """Write report.html, report.md and report.json into `out`; returns their paths by kind."""
    context = context or ReportContext()
    view = _view(rows, context)
    record = {
        **record_of(context, view),
        "checkpoints": [dict(c) for c in context.checkpoints],
        "verdicts": view["sentences"],
        "notes": view["notes"],
        "balance": [dict(b) for b in context.balance],
        "rows": rows.to_pylist(),
    }
    return write_pages(out, view, record, _plots(context))


def write_pages(
    out: Path, view: Mapping[str, Any], record: Mapping[str, Any], drawn: Mapping[str, Any]
) -> dict[str, Path]:
    """Fill the pages with `view` (HTML with `drawn` too) and write them beside `record` as JSON."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["plain"] = _markdown
    texts = {
        "html": environment.get_template("report.html.j2").render({**view, **drawn}),
        "md": environment.get_template("report.md.j2").render(view),
        "json": json.dumps(_finite(record), indent=1, default=str, allow_nan=False) + "\n",
    }
    out.mkdir(parents=True, exist_ok=True)
    paths = {kind: out / f"report.{kind}" for kind in texts}
    for kind, text in texts.items():
        paths[kind].write_text(text, encoding="utf-8")
    return paths


def record_of(context: ReportContext, view: Mapping[str, Any]) -> dict[str, Any]:
    """What every report's JSON says of where it comes from."""
    return {
        "title": context.title,
        "created_at": view["created_at"],
        "snapshot": context.snapshot,
        "configuration": context.configuration,
        "git_revision": context.git_revision,
        "command": context.command,
    }


def page_of(
    context: ReportContext,
    *,
    sentences: Sequence[str],
    suites: Sequence[Mapping[str, Any]],
    legend: str,
    reading: Sequence[str],
) -> dict[str, Any]:
    """What `write_pages` fills in for a report of something else than an evaluation."""
    return {
        **head_of(context),
        "sentences": sentences,
        "glance": [],
        "suites": suites,
        "legend": legend,
        "checkpoints": {"heads": [], "lines": [], "long": []},
        "reading": reading,
        "rulers": [],
        "notes": [*context.notes],
        "columns": [],
        "rows": [],
    }


def heads(*names: str) -> list[Mapping[str, str]]:
    """The heads of a table's columns."""
    return [{"name": name, "size": ""} for name in names]


def cell(value: str, ends: str = "") -> dict[str, str]:
    """A cell of a table; `ends` is its interval."""
    return {"value": value, "ends": ends, "note": "", "mark": ""}


def _view(rows: pa.Table, context: ReportContext) -> dict[str, Any]:
    """Everything that the pages show, as plain values."""
    return {
        **head_of(context),
        "checkpoints": checkpoints_view(context.checkpoints),
        "notes": [*notes_of(rows), *context.notes],
        **evaluation_view(rows, context.labels),
    }


def head_of(context: ReportContext) -> dict[str, Any]:
    """What every page begins and ends with: title, when, of what, and the command."""
    created = context.created_at or datetime.now(UTC)
    created_at = created.strftime("%Y-%m-%d %H:%M %Z").strip()
    facts = [created_at]
    for name in ("snapshot", "configuration", "git_revision"):
        value = getattr(context, name)
        if value is not None:
            facts.append(f"{'lake snapshot' if name == 'snapshot' else spoken(name)} {value}")
    return {
        "title": context.title,
        "created_at": created_at,
        "facts": facts,
        "command": context.command,
    }


def _plots(context: ReportContext) -> dict[str, Any]:
    """Plots that are not of one suite."""
    from trainer import plots

    made = []
    if any(context.curves.values()):
        caption = "Means over the steps since the point before."
        svg = plots.curves_svg(context.curves)
        made.append({"title": "Training", "caption": caption, "svg": svg})
    if context.balance:
        caption = "Labels of each split; in brackets, how many rows it has."
        svg = plots.balance_svg(context.balance)
        made.append({"title": "Corpus", "caption": caption, "svg": svg})
    return {"plots": made}


def _markdown(text: Any) -> str:
    """Text that cannot end a table cell or open a tag."""
    return html.escape(" ".join(str(text).split()), quote=False).replace("|", "\\|")


def _finite(value: Any) -> Any:
    """The same value with null for every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
