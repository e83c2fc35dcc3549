"""Reading the rows of an evaluation: strata, the best ruler, and what it all says in sentences.

Nothing is measured here; `report` puts the sentences beside tables and plots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from trainer.evaluate import ALL, CELLS, DISCRIMINATION, MODEL, PREFERENCE, SIBLINGS
from trainer.rulers import BLIND, RULERS, SHUFFLED

MINUS = "\N{MINUS SIGN}"
FEW_CLUSTERS = 10  # below, percentile intervals are too narrow where clusters differ

Row = Mapping[str, Any]
Labels = Mapping[str, Mapping[str, str]]  # suite -> scorer -> what to call it

_SUITES = {DISCRIMINATION: "Policy discrimination", PREFERENCE: "Preference"}
_CELLS = {
    "seen": "seen prompts and seen policies",
    "new_policy": "new policies",
    "new_prompt": "new prompts",
    "both_new": "new prompts and new policies",
    ALL: "all cells",
}


@dataclass(kw_only=True)
class Stratum:
    """All rows of one suite, cell and category; scorers in the order of the rows."""

    suite: str
    cell: str
    category: str
    accuracy: dict[str, Row] = field(default_factory=dict)
    difference: dict[str, Row] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """Scorers that are no rulers; differences are taken from the first."""
        return [name for name in self.accuracy if not is_ruler(name)]

    @property
    def model(self) -> Row:
        """The accuracy row of the model."""
        return self.accuracy[self.models[0]]

    @property
    def best_ruler(self) -> Row | None:
        """The accuracy row of the highest ruler, None where there is no ruler."""
        rulers = [row for name, row in self.accuracy.items() if is_ruler(name)]
        return max(rulers, key=lambda row: row["value"], default=None)

    @property
    def rulers_above(self) -> list[str]:
        """Rulers whose accuracy is higher than the model's, highest first."""
        above = [
            row
            for name, row in self.accuracy.items()
            if is_ruler(name) and row["value"] > self.model["value"]
        ]
        return [row["scorer"] for row in sorted(above, key=lambda row: -row["value"])]

    @property
    def name(self) -> str:
        """Suite, cell and category in words."""
        parts = [_SUITES.get(self.suite, spoken(self.suite)), _CELLS.get(self.cell, self.cell)]
        if self.category != ALL:
            parts = [parts[0], spoken(self.category)] + ([] if self.cell == ALL else parts[1:])
        return ", ".join(parts)

    @property
    def short_name(self) -> str:
        """Suite and cell, or category where it is one, for a table."""
        part = self.cell if self.category == ALL else self.category
        return f"{_SUITES.get(self.suite, spoken(self.suite))}, {spoken(part)}"


def is_ruler(scorer: str) -> bool:
    """Whether a scorer is a ruler rather than a model."""
    return scorer in RULERS or scorer == SHUFFLED


def spoken(name: str) -> str:
    """A name as it is said: without underscores."""
    return name.replace("_", " ")


def read_strata(rows: pa.Table | Iterable[Row]) -> list[Stratum]:
    """The strata of an evaluation, in the order of their rows."""
    found: dict[tuple[str, str, str], Stratum] = {}
    for row in rows.to_pylist() if isinstance(rows, pa.Table) else rows:
        suite, cell, category = key = row["suite"], row["cell"], row["category"]
        stratum = found.setdefault(key, Stratum(suite=suite, cell=cell, category=category))
        getattr(stratum, row["metric"])[row["scorer"]] = row
    return [stratum for stratum in found.values() if stratum.models]


def verdicts(rows: pa.Table | Iterable[Row], labels: Labels | None = None) -> list[str]:
    """What an evaluation says, in plain sentences, the good and the bad alike."""
    strata = read_strata(rows)
    said: list[str] = []
    for suite in dict.fromkeys(stratum.suite for stratum in strata):
        own = [stratum for stratum in strata if stratum.suite == suite]
        names = (labels or {}).get(suite, {})
        main = [s for s in own if s.category == ALL and s.cell in _main_cells(own)]
        siblings = [s for s in own if s.category == SIBLINGS and s.cell == ALL]
        categories = [s for s in own if s.category not in (ALL, SIBLINGS)]
        for stratum in main + siblings:
            said += _against_rulers(stratum, names)
        for stratum in main:
            said += _against_models(stratum, names)
        said += _by_category(categories)
        said += _shuffled(main)
        if suite == DISCRIMINATION:
            said += _blind(own)
        said += _few_clusters(main + siblings)
    return said


def _main_cells(strata: Sequence[Stratum]) -> list[str]:
    """Cells of discrimination one by one; of preference all together."""
    cells = [s.cell for s in strata if s.category == ALL]
    single = [cell for cell in cells if cell in CELLS]
    return single if strata[0].suite == DISCRIMINATION and single else [ALL]


def _against_rulers(stratum: Stratum, names: Mapping[str, str]) -> list[str]:
    model, best = stratum.model, stratum.best_ruler
    said = (
        f"{stratum.name}: {_called(model['scorer'], names)} is right in {_percent(model)} of "
        f"{model['n']:,} comparisons"
    )
    if best is None:
        return [f"{said}."]
    lead = stratum.difference[best["scorer"]]
    ruler = _called(best["scorer"], names)
    said += f"; the best ruler, {ruler}, in {_percent(best)}."
    if lead["low"] > 0:
        return [f"{said} The model is ahead by {_points(lead)}."]
    if lead["value"] >= 0:
        return [f"{said} That lead, {_points(lead)}, could be chance."]
    above = [_called(name, names) for name in stratum.rulers_above[1:]]
    more = f" Also above it: {', '.join(above)}." if above else ""
    sure = "beyond chance" if lead["high"] < 0 else "which could be chance"
    return [f"{said} The ruler is above the model, by {_points(lead, -1)}, {sure}.{more}"]


def _against_models(stratum: Stratum, names: Mapping[str, str]) -> list[str]:
    said = []
    for other in stratum.models[1:]:
        lead = stratum.difference[other]
        model, rival = _called(stratum.models[0], names), _called(other, names)
        if lead["low"] > 0:
            verdict = f"{model} is above {rival} by {_points(lead)}"
        elif lead["high"] < 0:
            verdict = f"{model} is below {rival} by {_points(lead, -1)}"
        else:
            verdict = f"{model} and {rival} are not told apart: {_points(lead)} between them"
        said.append(f"{stratum.name}: {verdict}.")
    return said


def _by_category(strata: Sequence[Stratum]) -> list[str]:
    behind = [s for s in strata if s.rulers_above]
    if not strata:
        return []
    name = _SUITES[strata[0].suite]
    if not behind:
        return [f"{name}: in each of {len(strata)} categories the model is above every ruler."]
    listed = ", ".join(f"{s.category} ({spoken(s.rulers_above[0])})" for s in behind)
    return [
        f"{name}: in {len(behind)} of {len(strata)} categories a ruler is above the model: "
        f"{listed}. Most categories are small: read their intervals."
    ]


def _shuffled(strata: Sequence[Stratum]) -> list[str]:
    rows = [(s, s.accuracy[SHUFFLED]) for s in strata if SHUFFLED in s.accuracy]
    if not rows:
        return []
    listed = "; ".join(f"{_CELLS.get(s.cell, s.cell)} {_percent(row)}" for s, row in rows)
    return [f"{_SUITES[rows[0][0].suite]} with references of other groups: {listed}."]


def _blind(strata: Sequence[Stratum]) -> list[str]:
    rows = [(s, s.accuracy[BLIND]) for s in strata if s.category == ALL and BLIND in s.accuracy]
    off = [(s, row) for s, row in rows if not row["low"] <= 0.5 <= row["high"]]
    if not rows:
        return []
    if not off:
        return ["The reference-blind ruler is at 50 % within its interval in every cell, as due."]
    listed = "; ".join(f"{_CELLS.get(s.cell, s.cell)} {_percent(row)}" for s, row in off)
    return [
        f"The reference-blind ruler is not at 50 %: {listed}. Where it is above, candidates give "
        "the label away without the reference."
    ]


def _few_clusters(strata: Sequence[Stratum]) -> list[str]:
    few = [s for s in strata if s.model["clusters"] < FEW_CLUSTERS]
    if not few:
        return []
    listed = "; ".join(f"{s.name} {s.model['clusters']}" for s in few)
    return [
        f"Fewer than {FEW_CLUSTERS} clusters, so that intervals say little about other prompts or "
        f"policies: {listed}."
    ]


def _called(scorer: str, names: Mapping[str, str]) -> str:
    if scorer in names:
        return names[scorer]
    if is_ruler(scorer):
        return spoken(scorer)
    return "the model" if scorer == MODEL else f"the model {spoken(scorer)!r}"


def _percent(row: Row) -> str:
    return f"{100 * row['value']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _points(row: Row, sign: int = 1) -> str:
    value, *ends = (100 * sign * row[key] for key in ("value", "low", "high"))
    said = f"{value:+.1f} points [{min(ends):+.1f}, {max(ends):+.1f}]"
    return said.replace("-", MINUS)
