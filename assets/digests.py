"""Digests: of settings, of anything that JSON can say, and of code with all that it imports.

What is compared with them is in `stages.py`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

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
        spec = importlib.util.find_spec(name)
        if name in trees or name in _SHARED or spec is None or spec.origin is None:
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        trees[name] = _without_docstrings(tree)
        queue += [found for found in _imports(tree) if found.split(".")[0] in _FLOORS]
    return digest(trees)


def _imports(tree: ast.Module) -> Iterator[str]:
    """Names of modules that a module imports, at whatever depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if node.module.split(".")[0] in _FLOORS and _is_module(name):
                    yield name


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


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
