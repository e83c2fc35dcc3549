"""Weights of a checkpoint folder, tensor by tensor: read from any shards, written to safetensors.

Nothing here knows what a tensor means. A folder larger than memory passes through, because files
are mapped, not read, and a shard is written as soon as it is full.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.errors import BadCheckpointError
from trainer.files import read_object
from trainer.packing import Progress

SHARD_BYTES = 2 << 30
WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|msgpack|h5|gguf)(\.index\.json)?$")
"""Names of files that hold weights, or say which file holds which."""
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder by name, in the order of its files, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Find the files and the names in them.

        Raises:
            BadCheckpointError: there are none, or one is missing or cut off.
        """
        self._opened: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        files, declared = _files(folder)
        for file in files:
            for name in self._open(file).keys():  # noqa: SIM118 - safetensors offers no iterator
                if _learned(name):
                    self._where[name] = file
        lost = sorted(set(filter(_learned, declared)) - self._where.keys())
        if lost:
            msg = f"{folder}: the index names {lost[0]}, which no file holds; download it again"
            raise BadCheckpointError(msg)

    def __getitem__(self, name: str) -> Tensor:
        opened = self._open(self._where[name])
        return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            try:
                if file.suffix == ".safetensors":
                    self._opened[file] = safe_open(file, "pt")
                else:
                    self._opened[file] = torch.load(
                        file, map_location="cpu", mmap=True, weights_only=True
                    )
            except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
                msg = f"{file}: not a readable file of weights ({error}); download it again"
                raise BadCheckpointError(msg) from error
        return self._opened[file]


def _learned(name: str) -> bool:
    return not name.endswith("rotary_emb.inv_freq")  # computed, though some files hold it


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of weights, and the names that an index says are in them."""
    for name in _INDEXES:
        if (folder / name).is_file():
            index = _index(folder / name)
            files = [folder / file for file in sorted(set(index.values()))]
            lost = [file.name for file in files if not file.is_file()]
            if lost:
                msg = f"{folder}: {', '.join(lost)} missing; download it again"
                raise BadCheckpointError(msg)
            return files, list(index)
    for name in _SINGLES:
        if (folder / name).is_file():
            return [folder / name], []
    msg = f"{folder}: no weights; expected one of {', '.join((*_INDEXES, *_SINGLES))}"
    raise BadCheckpointError(msg)


def _index(file: Path) -> dict[str, str]:
    where = read_object(file, "download it again").get("weight_map")
    if not isinstance(where, dict):
        msg = f"{file}: not an index of weights: no weight_map in it; download it again"
        raise BadCheckpointError(msg)
    return where


class Shards:
    """Safetensors files in a folder, named and indexed as transformers does it."""

    def __init__(self, folder: Path, limit: int, progress: Progress | None = None) -> None:
        self.folder, self.limit, self.progress = folder, limit, progress

    def write(self, tensors: Iterable[tuple[str, Callable[[], Tensor]]]) -> None:
        """Write named tensors; each is made only when its turn comes."""
        listed = list(tensors)
        written: list[list[str]] = []
        waiting: dict[str, Tensor] = {}
        held = total = 0
        for done, (name, make) in enumerate(listed, start=1):
            tensor = make().contiguous()
            if waiting and held + tensor.nbytes > self.limit:
                written.append(self._flush(waiting, len(written)))
                held = 0
            waiting[name] = tensor
            held, total = held + tensor.nbytes, total + tensor.nbytes
            if self.progress:
                self.progress(done, len(listed), name)
        written.append(self._flush(waiting, len(written)))
        self._name(written, total)

    def _flush(self, tensors: dict[str, Tensor], number: int) -> list[str]:
        save_file(tensors, self.folder / f"{number}.part", metadata={"format": "pt"})
        names = list(tensors)
        tensors.clear()
        return names

    def _name(self, written: list[list[str]], total: int) -> None:
        if len(written) == 1:
            (self.folder / "0.part").rename(self.folder / _SINGLES[0])
            return
        where: dict[str, str] = {}
        for number, names in enumerate(written):
            file = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
            (self.folder / f"{number}.part").rename(self.folder / file)
            where |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        text = json.dumps(index, indent=2) + "\n"
        (self.folder / _INDEXES[0]).write_text(text, encoding="utf-8")
