"""One tiny home, made once; tests that change it work on a copy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.assets.homes import TINY, Home, tiny

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the made home stay in one worker, so that it is made once."""
    for item in items:
        if {"made", "copy"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("house"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The tiny home after a complete run. Read it, never write to it."""
    home = Home(tmp_path_factory.mktemp("tiny") / "home", TINY / "run.yaml")
    outcome = home.run()
    assert outcome.ok, outcome.failed
    return home


@pytest.fixture
def copy(made: Home, tmp_path: Path) -> Home:
    """A copy of the made home, free to change."""
    return made.copy(tmp_path)


@pytest.fixture
def fresh(tmp_path: Path) -> Home:
    """An empty home with the tiny configuration, free to change."""
    return tiny(tmp_path)
