"""A home with a configuration, as tests use it: run, look at the plan, ask the lake, change things.

`tiny` is a pool that goes through every stage in less than a minute. Runs happen in this process;
`polar` starts the command as a user would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from assets.claims import CLAIMS
from assets.definitions import build_definitions
from assets.progress import Progress
from assets.run import Item, Outcome, execute, plan
from assets.workspace import Workspace
from pipelines.lake import Append, Change
from tests.pipelines.lake_rows import rows

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parent / "tiny"
ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}


@dataclass
class Watch:
    """A listener that remembers what was made and can act on progress."""

    finished: list[tuple[str, str | None]] = field(default_factory=list)

    def start(self, item: Item) -> Progress:
        return lambda done, total, note: None

    def finish(self, item: Item, seconds: float, error: str | None) -> None:
        self.finished.append((item.title, error))

    def wait(self, note: str) -> None:
        self.finished.append((note, None))


@dataclass(frozen=True)
class Home:
    """A POLAR_HOME and the configuration that it is used with."""

    path: Path
    config: Path
    data: Path | None = None

    def copy(self, to: Path) -> Home:
        """The same home elsewhere, configuration and pool file included: free to change."""
        home = replace(self, path=to / "home", config=to / self.config.name)
        shutil.copytree(self.path, home.path)
        (home.path / CLAIMS).unlink(missing_ok=True)  # its pool file is another one, too
        for file in self.config.parent.glob("*.yaml"):
            shutil.copy(file, to / file.name)
        return home

    def workspace(self) -> Workspace:
        return Workspace.load(self.config, self.data, self.path)

    @contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("POLAR_HOME", str(self.path))
            patch.setenv("DAGSTER_HOME", str(ROOT))
            with dg.DagsterInstance.get() as instance:
                yield instance

    def run(self, until: str | None = None, listener: Any = None) -> Outcome:
        workspace = self.workspace()
        with self.instance() as instance:
            definitions = build_definitions(workspace)
            return execute(workspace, instance, definitions, until=until, listener=listener)

    def plan(self, until: str | None = None) -> dict[str, str]:
        """What a run would make: titles with reasons."""
        with self.instance() as instance:
            return {item.title: item.reason for item in plan(self.workspace(), instance, until)}

    def query(self, sql: str) -> list[dict[str, Any]]:
        with self.workspace().lake(read_only=True) as lake:
            return lake.query(sql).to_pylist()

    def publish(self, *changes: Change) -> None:
        """Doctor the lake."""
        with self.workspace().lake() as lake:
            lake.publish("tests", "doctored", list(changes))

    def one(self, sql: str) -> Any:
        """The one value that a query gives."""
        (row,) = self.query(sql)
        (value,) = row.values()
        return value

    def dagster_runs(self) -> int:
        with self.instance() as instance:
            return instance.get_runs_count()

    def edit(self, file: str, **sections: Any) -> None:
        """Change keys of the configuration or pool file; a dict changes keys inside a section."""
        path = self.config.parent / file
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, value in sections.items():
            inner = isinstance(value, dict) and isinstance(content.get(name), dict)
            content[name] = {**content[name], **value} if inner else value
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    def environment(self) -> dict[str, str]:
        return {**os.environ, **ENV, "POLAR_HOME": str(self.path)}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "assets.cli", *arguments]

    def polar(
        self, *arguments: str, timeout: float = 280, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run the `polar` command on this home to its end."""
        return subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            **options,
        )

    def polar_run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`polar run` with this home's configuration and data."""
        data = ["--data", str(self.data)] if self.data else []
        return self.polar("run", "--config", str(self.config), *data, *arguments, **options)


def stray_pair() -> tuple[Append, Append]:
    """A pair of trajectories that nobody knows, and the prompt of another source that it is of."""
    prompt = {"prompt_id": b"p" * 16, "source": "elsewhere"}
    pair = {"trajectory_a": b"a" * 16, "trajectory_b": b"b" * 16, "prompt_id": b"p" * 16}
    labels = {"label": "cross_policy", "relation": "same", "split": "train", "cell": "seen"}
    return Append("prompts", rows("prompts", prompt)), Append("pairs", rows("pairs", pair | labels))


def tiny(folder: Path) -> Home:
    """An empty home with a copy of the tiny pool, free to change."""
    for file in TINY.glob("*.yaml"):
        shutil.copy(file, folder / file.name)
    return Home(folder / "home", folder / "run.yaml")


def refused(result: tuple[int, str, str], *words: str) -> None:
    """The command ended with 2 and one message that holds the words; no traceback."""
    code, out, err = result
    assert code == 2, (out, err)
    assert err.startswith("error: ")
    assert "Traceback" not in err + out
    for word in words:
        assert word in err, (word, err)
