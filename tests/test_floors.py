"""The arrows between the floors, held by reading every import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"assets", "pipelines", "trainer"}
ALLOWED = {"assets": {"assets", "pipelines", "trainer"}, "pipelines": {"pipelines"},
           "trainer": {"trainer"}}  # fmt: skip
NEVER = {
    "assets": set(),
    "pipelines": {"dagster"},
    "trainer": {"apache_beam", "dagster", "duckdb"},
}
NOT_AT_MODULE_LEVEL = {
    "assets": {"torch", "transformers", "apache_beam"},
    "pipelines": {"torch", "transformers"},
    "trainer": set(),
}


def imported(nodes) -> set[str]:
    """Top-level packages named by import statements among `nodes`."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


FILES = sorted(p for floor in FLOORS for p in (ROOT / floor).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_floor_arrows(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    everywhere = imported(ast.walk(tree))
    assert everywhere & FLOORS <= ALLOWED[floor]
    assert not everywhere & NEVER[floor]
    assert not imported(tree.body) & NOT_AT_MODULE_LEVEL[floor]
    assert ast.get_docstring(tree), "a room says what it holds"


def test_rooms_are_found() -> None:
    assert len(FILES) > 20
