"""What `polar explain` and `polar diff` show: nested facts as an outline, and as tables.

The facts are from `pipelines/explain.py` and `pipelines/difference.py`; `--json` prints them as
they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.difference import difference
from pipelines.explain import explain
from pipelines.lake import Lake

console = Console()

WIDTH = 160  # up to which a row stays on one line
LINE = 300  # characters of a text that an outline shows


def explain_command(home: Path, given: str, *, again: bool, as_json: bool) -> bool:
    """Print the way of a trajectory, pair or checkpoint.

    With `again`, the trajectory is made again too; false when another text came out.
    """
    with Lake.open(home, read_only=True) as lake:
        facts = explain(lake, given)
    if again:
        from pipelines.remake import remake

        text = remake(facts, home / "policies")
        facts["made again"] = {"text": text, "same": text == facts["trajectory"]["text"]}
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        for line in outline(facts):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return not again or facts["made again"]["same"]


def diff_command(home: Path, before: int, after: int | None, *, as_json: bool) -> None:
    """Print what changed between two snapshots; the newest one where `after` is not given."""
    with Lake.open(home, read_only=True) as lake:
        facts = difference(lake, before, lake.snapshot() if after is None else after)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    for name in ("before", "after"):
        head = facts[name]
        console.print(
            f"{name + ':':<8} snapshot {head['snapshot']}, {head['time']}: {head['message']}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    sections = {name: rows for name, rows in facts.items() if isinstance(rows, list) and rows}
    for name, rows in sections.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        table = Table(*columns, title=name.replace("_", " "))
        for row in rows:
            table.add_row(*(_cell(row.get(column)) for column in columns))
        console.print(table)
    if not sections:
        console.print("Nothing differs.")


def outline(facts: Any, indent: int = 0) -> Iterator[str]:
    """Facts as lines of `name: value`, indented; what is unknown or empty is left out."""
    blank = "  " * indent
    items = facts.items() if isinstance(facts, dict) else enumerate(facts, 1)
    for name, value in items:
        title = f"{blank}{name}:" if isinstance(facts, dict) else f"{blank}{name}."
        if isinstance(value, dict | list) and _flat(value):
            yield f"{title} {_one_line(value)}"
        elif isinstance(value, dict | list):
            if value:
                yield title
                yield from outline(value, indent + 1)
        elif value is not None and value != "":
            yield f"{title} {_cell(value)}"


def _flat(value: Any) -> bool:
    """Whether a list, or a short row of a list, reads better on one line."""
    inner = value.values() if isinstance(value, dict) else value
    return (
        bool(value)
        and all(not isinstance(item, dict | list) for item in inner)
        and len(_one_line(value)) <= WIDTH
    )


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items() if v not in (None, ""))
    return ", ".join(map(_cell, value))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)[1:-1]  # line breaks stay on the line
        return text if len(text) <= LINE else f"{text[:LINE]} ... ({len(value):,} characters)"
    return str(value)
