"""One tiny home, made once; tests that change it work on a copy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from assets import cli
from tests.assets.homes import ROOT, TINY, Home, tiny

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before the plugin that reads the mark
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


@pytest.fixture
def polar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs `polar` in this process on an empty home; gives exit code, output and errors."""
    monkeypatch.setenv("POLAR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAGSTER_HOME", str(ROOT))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str, home: Path | None = None) -> tuple[int, str, str]:
        if home:
            monkeypatch.setenv("POLAR_HOME", str(home))
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return call
