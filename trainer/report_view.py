"""What the pages of a report show: the rows of an evaluation as tables of finished text.

Nothing is written here; `report` fills the pages with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from trainer import intervals
from trainer.evaluate import ALL, DISCRIMINATION, PREFERENCE, SIBLINGS
from trainer.rulers import DESCRIPTIONS
from trainer.verdicts import MINUS, Labels, Row, Stratum, is_ruler, read_strata, spoken, verdicts

_ABOUT = {
    DISCRIMINATION: (
        "Policy discrimination",
        "Does a second answer of the reference's own policy score above answers of other policies? "
        "One comparison is the positive against one negative. A cell says which prompts and "
        "policies were held out of training; answers of sibling policies (other checkpoints of "
        "the reference's run) are harder and stand apart.",
    ),
    PREFERENCE: (
        "Preference",
        "Does the better of two answers score higher, given a reference? One comparison is two "
        "answers of one prompt that were judged differently.",
    ),
}
_LONG = 80  # characters of a fact that no longer fits a table
_MARKS = {
    intervals.TWO_WAY: "",
    intervals.PROMPTS: "p",
    intervals.POLICIES: "q",
    intervals.WILSON: "w",
}
_LEGEND = (
    "Intervals resample prompt groups and policy groups, except p: prompt groups only, because "
    "there is one policy group; q: policy groups only, because there is one prompt group; "
    "w: Wilson's interval with one observation a cluster, because all resamples agree or there is "
    "one cluster only."
)
_READING = (
    "An accuracy is the share of comparisons in which the right candidate scores higher, in fp32; "
    "a tie counts one half, so 50 % is what no knowledge gives.",
    "Comparisons of one prompt, or with one policy's reference, resemble each other. Intervals "
    "therefore resample whole prompt groups and, independently, whole policy groups of the "
    "reference (two-way cluster bootstrap, percentiles of the means). They speak of other prompts "
    "and policies like these, not only of these. They are cautious: where clusters do not matter "
    "they are up to 1.7 times too wide. With few clusters they are rough. The clusters column is "
    "the smaller of the two numbers.",
    "A lead is a paired difference: the model less the other scorer on the same comparisons and "
    "the same resamples, so it can be clear where two intervals overlap. The best ruler is chosen "
    "after the fact, which favours the rulers.",
)


def evaluation_view(rows: pa.Table, labels: Labels) -> dict[str, Any]:
    """Sentences, the overview, a part for each suite, and all rows."""
    strata = read_strata(rows)
    used = {scorer for s in strata for scorer in s.accuracy}
    return {
        "sentences": verdicts(rows, labels),
        "glance": [_glance(s, labels.get(s.suite, {})) for s in strata if _headline(s)],
        "suites": [_suite(suite, strata, labels.get(suite, {})) for suite in _ABOUT],
        "legend": _LEGEND,
        "reading": _READING,
        "rulers": [(spoken(name), text) for name, text in DESCRIPTIONS.items() if name in used],
        "columns": rows.column_names,
        "rows": [[_shown(value) for value in row.values()] for row in rows.to_pylist()],
    }


def checkpoints_view(checkpoints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Short facts as a table; long ones (configurations) one by one below it."""
    facts = [{key: _shown(value) for key, value in c.items()} for c in checkpoints]
    heads = list(dict.fromkeys(key for c in facts for key in c))
    long = {key for c in facts for key, text in c.items() if len(text) > _LONG}
    short = [head for head in heads if head not in long]
    return {
        "heads": [spoken(head) for head in short],
        "lines": [[c.get(head, "") for head in short] for c in facts],
        "long": [
            {
                "title": f"{spoken(key)} of {c.get(short[0], '') if short else ''}",
                "text": _indented(c[key]),
            }
            for key in heads
            if key in long
            for c in facts
            if c.get(key)
        ],
    }


def _indented(text: str) -> str:
    """JSON on lines of its own; other text as it is."""
    try:
        return json.dumps(json.loads(text), indent=1, ensure_ascii=False)
    except ValueError:
        return text


def _headline(stratum: Stratum) -> bool:
    """Which strata the overview lists: cells of discrimination, siblings, preference overall."""
    if stratum.suite == DISCRIMINATION:
        return (stratum.category == SIBLINGS) == (stratum.cell == ALL)
    return stratum.category == ALL and stratum.cell == ALL


def _glance(stratum: Stratum, names: Mapping[str, str]) -> dict[str, Any]:
    best = stratum.best_ruler
    line = {
        "name": stratum.short_name,
        "n": f"{stratum.model['n']:,} · {stratum.model['clusters']}",
        "model": " ".join(_percent(stratum.model)),
        "ruler": "",
        "lead": "",
        "reading": "",
        "above": False,
    }
    if best is None:
        return line
    lead = stratum.difference[best["scorer"]]
    above = lead["value"] < 0
    if lead["low"] > 0:
        reading = "model ahead"
    elif above:
        reading = "ruler above" + ("" if lead["high"] < 0 else " (may be chance)")
    else:
        reading = "not told apart"
    return line | {
        "ruler": f"{names.get(best['scorer'], spoken(best['scorer']))} {_percent(best)[0]}",
        "lead": " ".join(_points(lead)),
        "reading": reading,
        "above": above,
    }


def _suite(suite: str, strata: Sequence[Stratum], names: Mapping[str, str]) -> dict[str, Any]:
    from trainer import plots

    own = [s for s in strata if s.suite == suite]
    main = _cells([s for s in own if s.category == ALL])
    siblings = _cells([s for s in own if s.category == SIBLINGS])
    categories = sorted(
        (s for s in own if s.category not in (ALL, SIBLINGS)), key=lambda s: -s.model["n"]
    )
    tables = [
        _table(part, kept, names)
        for part, kept in (("Per cell", main), ("Siblings", siblings))
        if kept
    ]
    if categories:
        tables.append(_category_table(categories, names))
    drawn = []
    if main:
        shown = {s.cell for s in main if s.cell != ALL} or {ALL}
        kept = [s for s in main + siblings if s.cell in shown]
        caption = "Accuracy with intervals: models in colour, rulers in grey, the best one darker"
        caption += "; open marks are siblings." if siblings else "."
        drawn.append({"svg": plots.accuracy_svg(kept, names, suite), "caption": caption})
    if categories:
        caption = "Accuracy per category, with intervals, beside each category's best ruler."
        drawn.append({"svg": plots.categories_svg(categories, names), "caption": caption})
    title, about = _ABOUT[suite]
    return {
        "title": title,
        "about": about,
        "empty": not own,
        "plots": drawn,
        "tables": tables,
    }


def _cells(strata: list[Stratum]) -> list[Stratum]:
    """The same, less the sum over all cells where there is one cell only."""
    single = [s for s in strata if s.cell != ALL]
    return single if len(single) == 1 else strata


def _table(title: str, strata: Sequence[Stratum], names: Mapping[str, str]) -> dict[str, Any]:
    """Scorers by strata: a line a scorer, models first, then leads over the best ruler."""
    scorers = list(dict.fromkeys(name for s in strata for name in s.accuracy))
    scorers.sort(key=is_ruler)
    lines = [
        {
            "name": names.get(scorer, spoken(scorer)),
            "kind": "" if is_ruler(scorer) else "model",
            "cells": [_accuracy_cell(stratum, scorer) for stratum in strata],
        }
        for scorer in scorers
    ]
    lines += [
        {
            "name": f"lead over {name}",
            "kind": "lead",
            "cells": [_lead_cell(stratum, scorer) for stratum in strata],
        }
        for name, scorer in _rivals(strata, names)
    ]
    return {
        "title": f"{title}: accuracy in %, leads in points",
        "corner": "scorer",
        "heads": [{"name": spoken(s.cell), "size": _size(s)} for s in strata],
        "lines": lines,
    }


def _category_table(strata: Sequence[Stratum], names: Mapping[str, str]) -> dict[str, Any]:
    """A line a category: the models, its best ruler, and the model's leads."""
    models, rivals = strata[0].models, list(_rivals(strata, names))
    heads = [names.get(scorer, spoken(scorer)) for scorer in models]
    if any(s.best_ruler for s in strata):
        heads.append("best ruler")
    heads += [f"lead over {name}" for name, _ in rivals]
    lines = []
    for stratum in strata:
        cells = [_accuracy_cell(stratum, scorer) for scorer in models]
        if best := stratum.best_ruler:
            cell = _accuracy_cell(stratum, best["scorer"])
            cells.append(cell | {"value": f"{spoken(best['scorer'])} {cell['value']}"})
        cells += [_lead_cell(stratum, scorer) for _, scorer in rivals]
        lines.append({"name": f"{stratum.category} ({_size(stratum)})", "kind": "", "cells": cells})
    return {
        "title": "Per category: accuracy in %, leads in points",
        "corner": "category",
        "heads": [{"name": head, "size": ""} for head in heads],
        "lines": lines,
    }


def _size(stratum: Stratum) -> str:
    return f"n {stratum.model['n']:,} · {stratum.model['clusters']} clusters"


def _rivals(
    strata: Sequence[Stratum], names: Mapping[str, str]
) -> Iterator[tuple[str, str | None]]:
    """What the model's lead is shown over: each other model, and the best ruler (None)."""
    for name in strata[0].models[1:]:
        yield names.get(name, spoken(name)), name
    if any(s.best_ruler for s in strata):
        yield "best ruler", None


def _accuracy_cell(stratum: Stratum, scorer: str) -> dict[str, str]:
    row = stratum.accuracy.get(scorer)
    if row is None:
        return _EMPTY
    best = stratum.best_ruler
    mark = "best" if best and best["scorer"] == scorer else ""
    if scorer in stratum.rulers_above:
        mark = "above"
    value, ends = _percent(row)
    return {"value": value, "ends": ends, "note": _MARKS[row["interval"]], "mark": mark}


def _lead_cell(stratum: Stratum, rival: str | None) -> dict[str, str]:
    best = stratum.best_ruler
    name = rival or (best["scorer"] if best else "")
    row = stratum.difference.get(name)
    if row is None:
        return _EMPTY
    value, ends = _points(row)
    mark = "above" if row["value"] < 0 else ""
    return {"value": value, "ends": ends, "note": _MARKS[row["interval"]], "mark": mark}


_EMPTY = {"value": "", "ends": "", "note": "", "mark": ""}


def _percent(row: Row) -> tuple[str, str]:
    return f"{100 * row['value']:.1f}", f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _points(row: Row) -> tuple[str, str]:
    value, low, high = (f"{100 * row[key]:+.1f}" for key in ("value", "low", "high"))
    return value.replace("-", MINUS), f"[{low}, {high}]".replace("-", MINUS)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return str(value)
