"""Digests: of settings, of anything that JSON can say, and of code with all that it imports.

What is compared with them is in `staleness.py`.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from assets.home import PROJECT

_FLOORS = ("pipelines", "trainer")
_SHARED = ("pipelines.schemas", "pipelines.settings", "pipelines.errors", "trainer.errors")


def digest(value: Any) -> str:
    """A short digest of settings, of lists of them, and of anything that JSON can say."""
    said = json.dumps(_plain(value), sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@cache
def code_digest(modules: tuple[str, ...]) -> str:
    """A digest of modules and of all that they import of the project; comments change nothing."""
    trees: dict[str, str] = {}
    queue = list(modules)
    while queue:
        name = queue.pop()
        path = _file(name)
        if name in trees or name in _SHARED or path is None:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        trees[name] = _without_docstrings(tree)
        queue += _imports(tree)
    return digest(trees)


def _imports(tree: ast.Module) -> Iterator[str]:
    """Names that a module imports, at whatever depth; some are no modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file(name: str) -> Path | None:
    """Where a module of the floors is; found without importing it, for that takes seconds."""
    if name.split(".")[0] not in _FLOORS:
        return None
    path = PROJECT.joinpath(*name.split("."))
    found = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in found if file.is_file()), None)


def _without_docstrings(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            first.value.value = ""
    return ast.dump(tree)
