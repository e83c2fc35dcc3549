"""Small files of JSON or YAML that hold one object, and the fault that says what to do about them.

Light to import: settings are read before anything heavy is. Lines of JSON belong to `data`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import BadCheckpointError, TrainerError


def read_object(
    file: Path, advice: str, fault: type[TrainerError] = BadCheckpointError
) -> dict[str, Any]:
    """The object in a JSON file, or the mapping in a YAML file, which may be empty.

    Raises:
        TrainerError: of the kind `fault`: it is not readable as such; the message ends with
            `advice`.
    """
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        msg = f"{file}: not readable ({error}); {advice}"
        raise fault(msg) from error
    if not isinstance(values, dict):
        msg = f"{file}: {type(values).__name__} where an object is expected; {advice}"
        raise fault(msg)
    return values
