"""Checkpoints as policies: runs that a pool file watches, and which of their checkpoints are whole.

    watch:
      - {name: mine, folder: runs/mine, pattern: "step-*", kind: base, policy_group: mine}
      - {name: pythia, hub: EleutherAI/pythia-160m, pattern: "step*", kind: base}

A checkpoint's step is the number at the end of its name; its parent is the one before it. Folders
are looked at each time a pool is read; of a hub those revisions count that it named last
(`hub.py`).
"""

from __future__ import annotations

import json
import re
import time
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines import hub
from pipelines.settings import Settings

SAFETENSORS_HEADER = 100 << 20  # bytes; a longer one is damage


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


def incomplete(folder: Path, settled: float = 0.0) -> str | None:
    """Why a checkpoint folder is not whole; None when it is.

    Whole means: a configuration that is JSON, a tokenizer, every shard that the index names, each
    safetensors file as long as its header says, and nothing written for `settled` seconds. A time
    in the future (a clock that went back) does not count as a change.
    """
    from pipelines.policies import TOKENIZERS, WEIGHTS

    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files = [path for path in folder.iterdir() if path.is_file()]
        ages = [time.time() - path.stat().st_mtime for path in files]
    except (OSError, ValueError):
        return "no config.json, or a broken one"
    weights = [path for path in files if any(path.match(pattern) for pattern in WEIGHTS)]
    if not weights:
        return "no weights"
    if not any(path.match(pattern) for path in files for pattern in TOKENIZERS):
        return "no tokenizer"
    for index in folder.glob("*.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return f"{index.name} is broken"
        if missing := sorted(named - {path.name for path in files}):
            return f"{missing[0]} is missing"
    for path in weights:
        if not _whole(path):
            return f"{path.name} is cut off"
    if any(0 <= age < settled for age in ages):
        return f"written less than {settled:.0f} s ago"
    return None


def _whole(path: Path) -> bool:
    try:
        if path.suffix == ".bin":
            return zipfile.is_zipfile(path)
        if path.suffix != ".safetensors":
            return path.stat().st_size > 0
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length < SAFETENSORS_HEADER:
                return False
            header = json.loads(file.read(length))
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        return path.stat().st_size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def parameters_of(folder: Path) -> int | None:
    """Parameters of local safetensors weights, from their headers; None where there are none."""
    total = 0
    for path in folder.glob("*.safetensors"):
        if not _whole(path):
            return None
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for side in tensor["shape"]:
                    size *= side
                total += size
    return total or None
