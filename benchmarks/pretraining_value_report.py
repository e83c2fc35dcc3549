"""The report of `bench-pretraining-value`: its table, one for each source, and the paper's.

The numbers are made in `pretraining_value`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.report import ReportContext, cell, heads, page_of, record_of, write_pages

FULL, PLAIN, BLIND = "pre-trained + fine-tuned", "fine-tuned only", "without reference"
PAPER = {  # Table 13, averages: full, without pre-training, without pre-training and reference
    "POLAR-1.8B": (74.0, 72.6, 63.3),
    "POLAR-7B": (76.3, 76.5, 70.8),
}
_ABOUT = (
    "Real preferences, five folds by prompt group, three seeds. Each arm is fine-tuned on the same "
    "judgements of the other folds; rulers are fitted on them, and read texts to their ends. The "
    "two arms that are not pre-trained start from random weights of the same shape. At 0 the "
    "pre-trained checkpoint is measured as it is."
)
_READING = (
    "Accuracy is the mean over sources, so a large source does not outweigh a small one; a source "
    "with few judgements of a kind does not count. Intervals (95 %, bootstrap) resample prompt "
    "groups. n counts judgements; outcomes are averaged over seeds.",
    "The paper's averages are over categories of its own, on other data and with other models.",
)


def write_value_report(out: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Path]:
    """Write report.html, report.md and report.json into `out`; returns their paths by kind."""
    context = ReportContext(
        title="What is pre-training worth?", command="make bench-pretraining-value"
    )
    suite = {
        "title": "Accuracy on judgements that were not learned from, in %",
        "about": _ABOUT,
        "empty": not rows,
        "plots": [],
        "tables": [_table(rows), *_source_tables(rows), _paper_table()],
    }
    sentences = [_sentence(row) for row in rows if "lead" in row]
    view = page_of(
        context,
        sentences=sentences or ["No size of the fine-tuning set is measured whole yet."],
        suites=[suite],
        legend="[95 % interval]",
        reading=_READING,
    )
    return write_pages(out, view, {**record_of(context, view), "rows": rows}, {"plots": []})


def _sentence(row: dict[str, Any]) -> str:
    value, low, high = (100 * row["lead"][key] for key in ("value", "low", "high"))
    return f"Pre-training at {row['size']}: {value:+.1f} points [{low:+.1f}, {high:+.1f}]."


def _table(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    found = {(_name(row), row["size"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(_name(row) for row in rows):
        own = [found.get((name, size)) for size in sizes]
        n = max(row["n"] for row in own if row)
        lines.append({"name": name, "kind": "", "cells": [*map(_accuracy, own), cell(f"{n:,}")]})
    return {
        "title": "By judgements to learn from",
        "corner": "scorer",
        "heads": heads(*map(str, sizes), "n"),
        "lines": lines,
    }


def _source_tables(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    tables = []
    for size in dict.fromkeys(row["size"] for row in rows):
        own = [row for row in rows if row["size"] == size and row["on"] == "with a reference"]
        sources = sorted({source for row in own for source in row["sources"]})
        lines = [
            {
                "name": row["scorer"],
                "kind": "",
                "cells": [cell(f"{100 * row['sources'][s]:.1f}") for s in sources],
            }
            for row in own
        ]
        title = f"By source, {size} judgements to learn from"
        tables.append(
            {"title": title, "corner": "scorer", "heads": heads(*sources), "lines": lines}
        )
    return tables


def _paper_table() -> dict[str, Any]:
    lines = [
        {"name": name, "kind": "", "cells": [cell(f"{value}") for value in values]}
        for name, values in PAPER.items()
    ]
    return {
        "title": "The paper's Table 13",
        "corner": "model",
        "heads": heads(FULL, PLAIN, BLIND),
        "lines": lines,
    }


def _name(row: dict[str, Any]) -> str:
    apart = row["on"] != "with a reference"
    return f"{row['scorer']}, judgements {row['on']}" if apart else row["scorer"]


def _accuracy(row: dict[str, Any] | None) -> dict[str, str]:
    if row is None:
        return cell("")
    value, low, high = (100 * row[key] for key in ("value", "low", "high"))
    return cell(f"{value:.1f}", f"[{low:.1f}, {high:.1f}]")
