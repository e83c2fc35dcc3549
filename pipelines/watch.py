"""Checkpoints as policies: the runs that a pool file watches.

    watch:
      - {name: mine, folder: runs/mine, pattern: "step-*", kind: base, policy_group: mine}
      - {name: pythia, hub: EleutherAI/pythia-160m, pattern: "step*", kind: base}

A checkpoint's step is the number at the end of its name; its parent is the one before it. Folders
are looked at each time a pool is read, and whole ones count (`weights.py`); of a hub those
revisions count that it named last (`hub.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines import hub
from pipelines.settings import Settings
from pipelines.weights import incomplete


class Watch(Settings):
    """A run whose checkpoints become policies of the pool: `<name>-<step>`."""

    name: str = Field(min_length=1)
    folder: str | None = Field(default=None, description="under POLAR_HOME/policies, or absolute")
    hub: str | None = Field(default=None, description="repository whose revisions are checkpoints")
    pattern: str = Field(default="*", description="of the checkpoints' names")
    kind: Literal["base", "chat", "checkpoint"] = "checkpoint"
    engine: Literal["local", "vllm"] = "local"
    policy_group: str = Field(default="", description="default: name")
    family: str = ""
    parent: str | None = Field(default=None, description="of the first checkpoint")
    template: str = "{prompt}"
    licence: str | None = None
    licence_source: str | None = None
    parameters: float | None = Field(default=None, gt=0)
    split: Literal["train", "test"] | None = None
    settled: float = Field(default=30.0, ge=0, description="seconds without a change before use")

    @model_validator(mode="after")
    def _one_place(self) -> Watch:
        if (self.folder is None) == (self.hub is None):
            msg = f"watch {self.name!r}: say either `folder` or `hub`"
            raise ValueError(msg)
        if self.hub and self.engine == "local":
            msg = f"watch {self.name!r}: a hub's revisions need engine vllm"
            raise ValueError(msg)
        return self

    def policies(self, home: Path) -> list[dict[str, Any]]:
        """Pool entries of all whole checkpoints, by step; each the parent of the next."""
        entries: list[dict[str, Any]] = []
        for step, place in sorted(self._places(home)):
            shared = self.model_dump(
                include={"kind", "engine", "family", "template", "licence", "licence_source"}
                | {"parameters", "split"}
            )
            entries.append(
                {
                    **shared,
                    **place,
                    "name": f"{self.name}-{step}",
                    "policy_group": self.policy_group or self.name,
                    "lineage_step": step,
                    "parent": entries[-1]["name"] if entries else self.parent,
                }
            )
        return entries

    def unfinished(self, home: Path) -> dict[str, str]:
        """Checkpoints that match but are not whole yet, with the reason."""
        return {
            path.name: reason
            for path in self._folders(home)
            if (reason := incomplete(path, self.settled)) is not None
        }

    def _places(self, home: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.hub:
            for name, commit in hub.kept(home).get(self.hub, {}).items():
                if fnmatch(name, self.pattern) and (step := step_of(name)) is not None:
                    yield step, {"weights": self.hub, "revision": commit}
            return
        for path in self._folders(home):
            step = step_of(path.name)
            if step is not None and incomplete(path, self.settled) is None:
                yield step, {"weights": str(Path(self.folder or "") / path.name)}

    def _folders(self, home: Path) -> list[Path]:
        if self.folder is None:
            return []
        root = home / "policies" / self.folder
        found = root.glob(self.pattern) if root.is_dir() else ()
        return sorted(path for path in found if path.is_dir())


def step_of(name: str) -> int | None:
    """The training step that a checkpoint's name ends in.

    >>> step_of("checkpoint-1000"), step_of("main")
    (1000, None)
    """
    found = re.search(r"(\d+)$", name)
    return int(found.group(1)) if found else None
