"""Small pictures for the Dagster UI: an asset's numbers as a bar chart or a curve in its metadata.

The evaluation report has plots of its own in `trainer/report.py`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bars(title: str, values: Mapping[str, float]) -> dg.MarkdownMetadataValue:
    """A horizontal bar chart of named values, as a picture inside Markdown."""

    def draw(axes: Any) -> None:
        names = [str(name) for name in values]
        axes.barh(names[::-1], list(values.values())[::-1], color="#3b6ea5")
        for position, value in enumerate(list(values.values())[::-1]):
            label = f" {value:,.3f}" if isinstance(value, float) else f" {value:,}"
            axes.text(value, position, label, va="center", fontsize=7)
        axes.margins(x=0.15)

    return _picture(title, draw, height=0.9 + 0.22 * max(len(values), 1))


def curve(title: str, x: Sequence[float], y: Sequence[float]) -> dg.MarkdownMetadataValue:
    """A line chart, as a picture inside Markdown."""
    return _picture(title, lambda axes: axes.plot(x, y, color="#3b6ea5"), height=2.2)


def table(rows: Sequence[Mapping[str, Any]]) -> dg.MarkdownMetadataValue:
    """Rows as a Markdown table."""
    if not rows:
        return dg.MetadataValue.md("(no rows)")
    head = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in head) + " |" for row in rows]
    return dg.MetadataValue.md("\n".join(lines))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _picture(title: str, draw: Any, *, height: float) -> dg.MarkdownMetadataValue:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, height), dpi=90, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    return picture(title, figure)


def picture(title: str, figure: Figure) -> dg.MarkdownMetadataValue:
    """A finished figure, as a picture inside Markdown."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{data})")
