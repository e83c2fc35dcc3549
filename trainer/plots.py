"""Plots of the report as SVG text that sits inside a page, in the light and in the dark.

Text and axes take the colour of the text around them; only data have colours of their own. No
numbers are made here.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.evaluate import ALL, SIBLINGS
from trainer.scaling import Scaling
from trainer.verdicts import Stratum, is_ruler, spoken

INK = "#010203"  # stands for the colour of the page's text
MODELS = ("#2f7ed8", "#e07b39", "#23a57a", "#a66bd3", "#c9a227")
RULER = "#8a93a0"
BEST = "#5b6470"
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "text.parse_math": False,
}


def accuracy_svg(strata: Sequence[Stratum], names: Mapping[str, str], name: str) -> str:
    """One panel a cell: every scorer's accuracy with its interval; siblings as open marks."""
    main = [s for s in strata if s.category == ALL]
    siblings = {s.cell: s for s in strata if s.category == SIBLINGS}
    scorers = list(main[0].accuracy)[::-1]
    low = min(row["low"] for s in main for row in s.accuracy.values())
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(2.4 + 2.1 * len(main), 0.7 + 0.26 * len(scorers)))
        axes = figure.subplots(1, len(main), sharey=True, squeeze=False)[0]
        for axis, stratum in zip(axes, main, strict=True):
            best = stratum.best_ruler
            for height, scorer in enumerate(scorers):
                colour = _colour(stratum, scorer, best["scorer"] if best else "")
                _mark(axis, height, stratum.accuracy[scorer], colour)
                apart = siblings.get(stratum.cell)
                if apart and scorer in apart.accuracy:
                    _mark(axis, height - 0.28, apart.accuracy[scorer], colour, siblings=True)
            axis.axvline(0.5, color=INK, alpha=0.4, linewidth=0.8, linestyle=(0, (3, 3)))
            axis.set_title(f"{spoken(stratum.cell)}  (n = {stratum.model['n']:,})")
            axis.set_xlim(max(0, min(0.4, low - 0.03)), 1.005)
            _grid(axis, "x")
            axis.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}")
        axes[0].set_yticks(range(len(scorers)), [names.get(s, spoken(s)) for s in scorers])
        figure.supxlabel("accuracy, %", fontsize=9)
        return _svg(figure)


def categories_svg(strata: Sequence[Stratum], names: Mapping[str, str]) -> str:
    """One line a category: the models, and the best ruler of each, with intervals."""
    ordered = sorted(strata, key=lambda s: s.model["n"])
    models = ordered[0].models
    with rc_context({**_STYLE, "svg.hashsalt": "categories"}):
        figure = Figure(figsize=(8.4, 0.9 + (0.22 + 0.13 * len(models)) * len(ordered)))
        axis = figure.subplots()
        offsets = [0.62 * i / max(len(models), 1) - 0.3 for i in range(len(models) + 1)]
        for height, stratum in enumerate(ordered):
            for index, scorer in enumerate(models):
                label = names.get(scorer, spoken(scorer)) if height == 0 else None
                row = stratum.accuracy[scorer]
                _mark(axis, height - offsets[index], row, MODELS[index % len(MODELS)], label)
            if stratum.best_ruler:
                label = "best ruler" if height == 0 else None
                _mark(axis, height - offsets[-1], stratum.best_ruler, RULER, label)
        axis.axvline(0.5, color=INK, alpha=0.4, linewidth=0.8, linestyle=(0, (3, 3)))
        axis.set_yticks(
            range(len(ordered)), [f"{s.category}  (n = {s.model['n']:,})" for s in ordered]
        )
        axis.set_xlim(-0.01, 1.01)
        axis.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}")
        axis.set_xlabel("accuracy, %")
        _grid(axis, "x")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8)
        return _svg(figure)


def curves_svg(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Loss and accuracy of each training run over its steps, from the lines of metrics.jsonl.

    Runs whose lines have no accuracy are language models: their loss has a panel of its own.
    """
    ranking = [run for run, lines in curves.items() if any("accuracy" in line for line in lines)]
    language = [run for run, lines in curves.items() if lines and run not in ranking]
    panels = [("loss", "next-token loss", language), ("loss", "loss", ranking)]
    panels = [panel for panel in [*panels, ("accuracy", "accuracy", ranking)] if panel[2]]
    with rc_context({**_STYLE, "svg.hashsalt": "curves"}):
        figure = Figure(figsize=(1.2 + 4.1 * len(panels), 2.8))
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (metric, title, runs) in zip(axes, panels, strict=True):
            for index, run in enumerate(runs):
                lines = [line for line in curves[run] if line.get(metric) is not None]
                axis.plot(
                    [line["step"] for line in lines],
                    [line[metric] for line in lines],
                    color=MODELS[index % len(MODELS)],
                    linewidth=1.4,
                    label=spoken(run),
                )
            axis.set_title(f"{title} on training data")
            axis.set_xlabel("step")
            axis.legend(fontsize=8)
            _grid(axis, "both")
        return _svg(figure)


def balance_svg(balance: Sequence[Mapping[str, Any]]) -> str:
    """Labels within each split as shares of its rows."""
    splits = list(dict.fromkeys(str(row["split"]) for row in balance))
    labels = list(dict.fromkeys(str(row["label"]) for row in balance))
    rows = {(s, label): 0 for s in splits for label in labels}
    for row in balance:
        rows[str(row["split"]), str(row["label"])] += int(row["rows"])
    with rc_context({**_STYLE, "svg.hashsalt": "balance"}):
        figure = Figure(figsize=(8.4, 0.9 + 0.34 * len(splits)))
        axis = figure.subplots()
        for height, split in enumerate(splits[::-1]):
            whole = sum(rows[split, label] for label in labels)
            left = 0.0
            for index, label in enumerate(labels):
                share = rows[split, label] / max(whole, 1)
                name = spoken(label) if height == 0 else None
                colour = MODELS[index % len(MODELS)]
                axis.barh(height, share, left=left, height=0.62, color=colour, label=name)
                if share > 0.06:
                    middle = left + share / 2
                    axis.text(middle, height, f"{share:.0%}", ha="center", va="center", fontsize=8)
                left += share
        totals = [f"{s}  ({sum(rows[s, label] for label in labels):,})" for s in splits[::-1]]
        axis.set_yticks(range(len(splits)), totals)
        axis.set_xlim(0, 1)
        axis.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}")
        axis.set_xlabel("share of rows, %")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, fontsize=8)
        return _svg(figure)


def scaling_svg(scaling: Scaling) -> str:
    """The figure of scaling laws as SVG."""
    with rc_context({**_STYLE, "svg.hashsalt": "scaling"}):
        return _svg(scaling_figure(scaling))


def scaling_figure(scaling: Scaling) -> Figure:
    """Loss over N and over C on logarithmic axes: runs with intervals, laws through the sizes."""
    titles = {"N": "weights without embedding, N", "C": "compute of pre-training, C = 6 N D"}
    figure = Figure(figsize=(9.4, 3.6), layout="constrained")
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axis, (variable, title) in zip(axes, titles.items(), strict=True):
        for run in scaling.plan.runs:
            mean = scaling.means[run.name]
            at = run.size.parameters if variable == "N" else scaling.compute(run)
            axis.plot((at, at), (mean.low, mean.high), color=RULER, linewidth=1.2, alpha=0.6)
            axis.plot(at, mean.value, "o", color=RULER, markersize=4)
        x = np.array([point[variable] for point in scaling.points])
        axis.plot(x, [p["loss"] for p in scaling.points], "o", color=MODELS[0], label="mean")
        along = np.geomspace(x[0], x[-1], 100)
        for fit in (fit for fit in scaling.fits if fit.variable == variable):
            dashed = "floor" in fit.ends
            label = f"{fit.form}, R² {fit.law.r2:.4f}"
            style: Any = {"linestyle": "--" if dashed else "-", "color": MODELS[dashed]}
            axis.plot(along, fit.law.loss(along), linewidth=1.4, label=label, **style)
        axis.set(xscale="log", yscale="log", xlabel=title)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0e}")
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:.3g}")
        axis.yaxis.set_minor_formatter(lambda y, _: f"{y:.3g}")
        axis.tick_params(which="both", length=2)
        axis.legend(fontsize=8)
        axis.grid(which="both", color=INK, alpha=0.12, linewidth=0.6)
    axes[0].set_ylabel("loss on held-out pairs")
    return figure


def _colour(stratum: Stratum, scorer: str, best: str) -> str:
    if is_ruler(scorer):
        return BEST if scorer == best else RULER
    return MODELS[stratum.models.index(scorer) % len(MODELS)]


def _mark(
    axis: Axes,
    height: float,
    row: Mapping[str, Any],
    colour: str,
    label: str | None = None,
    *,
    siblings: bool = False,
) -> None:
    ends = row["low"], row["high"]
    width, size = (0.9, 3.5) if siblings else (1.8, 5)
    axis.plot(ends, (height, height), color=colour, linewidth=width, alpha=0.75)
    face = "none" if siblings else colour
    axis.plot(row["value"], height, "o", color=colour, mfc=face, markersize=size, label=label)


def _grid(axis: Axes, which: Literal["x", "both"]) -> None:
    axis.grid(axis=which, color=INK, alpha=0.12, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element whose ink is the text colour of the page."""
    figure.set_layout_engine("constrained")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
