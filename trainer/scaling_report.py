"""How scaling laws are shown: the report's pages with one figure, and the same as JSON.

The laws themselves are fitted in `scaling`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trainer.report import ReportContext, cell, heads, page_of, record_of, write_pages
from trainer.scaling import Fit, Law, Scaling

PAPER = {
    "N": Law(a=0.9, b=0.0425, floor=0.0, r2=0.9886),
    "C": Law(a=2.4, b=0.0342, floor=0.0, r2=0.9912),
}
"""The paper's laws (section 4.4): 50 million to a billion parameters, up to 54 billion tokens."""
GUESSING = math.log(2)  # the loss of equal scores
_ABOUT = (
    "Each size is a decoder trained from scratch: next-token training on the training answers, "
    "then POLAR pre-training. Sizes and budgets were fixed in the plan before any run, and the "
    "laws are fitted to all runs. N counts weights without the embedding; C is 6 N D, D the ids of "
    "the pre-training with each candidate's sequence whole; L is the Bradley-Terry loss on "
    "held-out pairs, the same for all runs; pairs of sibling policies stand apart, as in the "
    "evaluation."
)
_READING = (
    "A law is fitted by least squares of relative errors to one point a size, the mean of its "
    "seeds. R² is that of log L. With few points and one more unknown, a law with a floor fits "
    "closer by construction; its intervals say how much of it is known.",
    "Intervals (95 %, bootstrap) resample prompt groups and policy groups of the held-out pairs, "
    "the same draws for all runs, and add the noise between seeds, as large as among the sizes "
    "that have several. Another corpus is not in them.",
    "Foretold is the largest size's loss by a law fitted to the other sizes alone.",
    "Each size has one budget, so N and C rise together along one path: the two laws describe the "
    "same points and are not two pieces of evidence. Exponents of other data, sizes and schedules, "
    "the paper's included, are of another task and need not agree with these.",
)


def write_scaling_report(
    out: Path, scaling: Scaling, context: ReportContext | None = None
) -> dict[str, Path]:
    """Write report.html, report.md and report.json into `out`; returns their paths by kind."""
    from trainer.plots import scaling_svg

    context = context or ReportContext(title="POLAR scaling laws")
    suite = {
        "title": "Laws",
        "about": _ABOUT,
        "empty": False,
        "plots": [
            {
                "svg": scaling_svg(scaling),
                "caption": "Loss of each run with its interval; the law through the sizes' means, "
                "and the law with a floor dashed.",
            }
        ],
        "tables": [_laws_table(scaling), _runs_table(scaling)],
    }
    view = page_of(
        context,
        sentences=[*map(_sentence, scaling.fits), *_remarks(scaling)],
        suites=[suite],
        legend=f"{_pairs(scaling)}; seconds are of both trainings.",
        reading=_READING,
    )
    record = {
        **record_of(context, view),
        "plan": scaling.plan.model_dump(mode="json"),
        "laws": laws_of(scaling),
        "runs": runs_of(scaling),
        "spread": scaling.spread,
        "sentences": view["sentences"],
    }
    return write_pages(out, view, record, {"plots": []})


def laws_of(scaling: Scaling) -> list[dict[str, Any]]:
    """The laws as plain rows: formula, values, ends of intervals, R²."""
    rows = []
    for fit in scaling.fits:
        row: dict[str, Any] = {"law": fit.form, "variable": fit.variable}
        for name, (low, high) in fit.ends.items():
            row |= {name: getattr(fit.law, name), f"{name}_low": low, f"{name}_high": high}
        largest = scaling.points[-1]["loss"]
        rows.append(row | {"r2": fit.law.r2, "foretold": fit.foretold, "largest": largest})
    return rows


def runs_of(scaling: Scaling) -> list[dict[str, Any]]:
    """The runs as plain rows: what each cost, and its loss with its interval."""
    rows = []
    for run in scaling.plan.runs:
        result, mean = scaling.results[run.name], scaling.means[run.name]
        rows.append(
            {
                "run": run.name,
                "N": run.size.parameters,
                "tokens": result.tokens,
                "language_tokens": result.language_tokens,
                "C": scaling.compute(run),
                "loss": mean.value,
                "low": mean.low,
                "high": mean.high,
                "n": mean.n,
                "clusters": mean.clusters,
                "accuracy": result.accuracy,
                "siblings": result.siblings,
                "seconds": round(result.seconds, 1),
            }
        )
    return rows


def formula(law: Law, variable: str) -> str:
    """A law with its numbers."""
    floor = f" + {law.floor:.3f}" if law.floor else ""
    return f"L = {law.a:.3g} {variable}^{-law.b:.4g}{floor}"


def _sentence(fit: Fit) -> str:
    said = f"{formula(fit.law, fit.variable)}, R² {fit.law.r2:.4f}"
    ends = [
        f"{name} {getattr(fit.law, name):.3g} [{low:.3g}, {high:.3g}]"
        for name, (low, high) in fit.ends.items()
    ]
    paper = PAPER[fit.variable]
    beside = f" The paper has {formula(paper, fit.variable)}, R² {paper.r2}."
    return f"{said}: {', '.join(ends)}." + (beside if "floor" not in fit.ends else "")


def _remarks(scaling: Scaling) -> list[str]:
    runs, points = scaling.plan.runs, scaling.points
    span = points[-1]["C"] / points[0]["C"]
    said = [
        f"{len(runs)} runs of {len(points)} sizes over a factor of {span:.0f} in compute; losses "
        f"of one size differ between seeds by {100 * scaling.spread:.1f} % (standard deviation)."
    ]
    blind = [run.name for run in runs if scaling.means[run.name].high >= GUESSING]
    if blind:
        said.append(
            f"No better than guessing ({GUESSING:.3f}) within their intervals, yet counted like "
            f"all others: {', '.join(blind)}. Their rates or budgets may not suit them."
        )
    losses = [point["loss"] for point in points]
    if losses != sorted(losses, reverse=True):
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        said.append(f"The loss does not fall from every size to the next: {shown}.")
    return said


def _pairs(scaling: Scaling) -> str:
    mean = next(iter(scaling.means.values()))
    cell = scaling.plan.cell.replace("_", " ")
    return f"{mean.n:,} held-out pairs, cell {cell}, at least {mean.clusters} clusters"


def _laws_table(scaling: Scaling) -> dict[str, Any]:
    lines = []
    for fit in scaling.fits:
        law = fit.law
        values = {name: (f"{getattr(law, name):.3g}", ends) for name, ends in fit.ends.items()}
        cells = [
            _within(*values[name]) if name in values else cell("") for name in ("a", "b", "floor")
        ]
        cells += [cell(f"{law.r2:.4f}"), cell(f"{fit.foretold:.4f}")]
        cells += [cell(f"{scaling.points[-1]['loss']:.4f}")]
        lines.append({"name": f"L = {fit.form}", "kind": "model", "cells": cells})
    for variable, law in PAPER.items():
        cells = [cell(f"{law.a}"), cell(f"{law.b}"), cell(""), cell(f"{law.r2}")]
        lines.append(
            {
                "name": f"the paper's L = a {variable}^-b",
                "kind": "",
                "cells": [*cells, cell(""), cell("")],
            }
        )
    return {
        "title": "Laws, with 95 % intervals",
        "corner": "law",
        "heads": heads("a", "b", "floor", "R²", "foretold", "largest size"),
        "lines": lines,
    }


def _runs_table(scaling: Scaling) -> dict[str, Any]:
    lines = []
    for row in runs_of(scaling):
        cells = [
            cell(f"{row['N']:,}"),
            cell(f"{row['tokens'] / 1e6:.2f} M"),
            cell(f"{row['language_tokens'] / 1e6:.2f} M"),
            cell(f"{row['C']:.3g}"),
            _within(f"{row['loss']:.4f}", (row["low"], row["high"])),
            cell(f"{100 * row['accuracy']:.1f}"),
            cell("" if row["siblings"] is None else f"{row['siblings']:.4f}"),
            cell(f"{row['seconds']:.0f}"),
        ]
        lines.append({"name": row["run"], "kind": "", "cells": cells})
    return {
        "title": "Runs: ids in millions, accuracy in %",
        "corner": "run",
        "heads": heads(
            "N", "ids", "ids of language", "C", "loss", "accuracy", "siblings' loss", "seconds"
        ),
        "lines": lines,
    }


def _within(value: str, ends: tuple[float, float]) -> dict[str, str]:
    return cell(value, f"[{ends[0]:.3g}, {ends[1]:.3g}]")
