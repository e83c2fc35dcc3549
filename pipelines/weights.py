"""A checkpoint's folder: what its weights are, whether all of it is there, how large it is.

Files are looked at, no model is loaded. Which folders are policies is said in `policies.py`.
"""

from __future__ import annotations

import json
import math
import time
import zipfile
from pathlib import Path
from typing import Any

from pipelines import ids
from pipelines.errors import PolicyUnavailableError

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
CONFIGS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*", "merges.txt", "*.jinja")
# Keys of CONFIGS that say who wrote the file and where from, not what the policy does.
INCIDENTAL = {"transformers_version", "_name_or_path", "name_or_path", "_commit_hash"}
SAFETENSORS_HEADER = 100 << 20  # bytes; a longer one is damage


def fingerprint(folder: Path) -> str:
    """Hash of what weights do: tensors, configuration and tokenizer, 32 hex digits.

    The folder's place, times, other files and transformers' notes about itself do not matter.

    Raises:
        PolicyUnavailableError: the folder, its configuration or its weights are missing.
    """
    if not folder.is_dir():
        msg = f"no folder {folder}; make the weights or correct `weights`"
        raise PolicyUnavailableError(msg)
    if not (folder / "config.json").is_file():
        msg = f"{folder} holds no config.json: not a transformers checkpoint"
        raise PolicyUnavailableError(msg)
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        msg = f"{folder} holds no weights ({', '.join(WEIGHTS)})"
        raise PolicyUnavailableError(msg)
    parts: list[str | bytes] = []
    for path in sorted({p for pattern in (*WEIGHTS, *TOKENIZERS) for p in folder.glob(pattern)}):
        parts += [path.name, ids.of_file(path)]
    for name in CONFIGS:
        if (folder / name).is_file():
            parts += [name, _essential(folder / name)]
    return ids.content_id("weights", *parts).hex()


def _essential(path: Path) -> str:
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        msg = f"{path} is not a JSON object: {error}"
        raise PolicyUnavailableError(msg) from error
    return json.dumps({k: v for k, v in content.items() if k not in INCIDENTAL}, sort_keys=True)


def incomplete(folder: Path, settled: float = 0.0) -> str | None:
    """Why a checkpoint folder is not whole; None when it is.

    Whole means: a configuration that is JSON, a tokenizer, every shard that the index names, each
    safetensors file as long as its header says, and nothing written for `settled` seconds. A time
    in the future (a clock that went back) does not count as a change.
    """
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
        if path.suffix == ".safetensors":
            tensors(path)
        return path.stat().st_size > 0
    except (OSError, ValueError):
        return False


def tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, from its header: name -> dtype, shape, data_offsets.

    Raises:
        ValueError: the header is damaged, or the file is not as long as it says.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: Any = json.loads(file.read(length)) if 0 < length < SAFETENSORS_HEADER else None
    try:
        found = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        end = max((tensor["data_offsets"][1] for tensor in found.values()), default=0)
        whole = path.stat().st_size == 8 + length + end
    except (AttributeError, KeyError, TypeError, IndexError):
        whole = False
    if not whole:
        msg = f"{path} is cut off or damaged"
        raise ValueError(msg)
    return found


def parameters_of(folder: Path) -> int | None:
    """Parameters of local safetensors weights, from their headers; None where there are none."""
    try:
        files = [tensors(path) for path in folder.glob("*.safetensors")]
    except (OSError, ValueError):
        return None
    return sum(math.prod(t["shape"]) for found in files for t in found.values()) or None
