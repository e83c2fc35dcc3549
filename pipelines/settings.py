"""Configuration files: strict pydantic models and errors that name the nearest valid key.

Each stage keeps its own settings class beside its code; this room holds only what they share.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
MAY_HOLD_SECRETS = ("key", "url")  # in a setting's name: its value is not said again


class Settings(BaseModel):
    """Base of every configuration section: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def load_yaml(path: Path, model: type[M]) -> M:
    """Read a YAML file into `model`.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not fit; all faults in one message.
    """
    if not path.is_file():
        msg = f"{path}: no such configuration file"
        raise ConfigError(msg)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{path}: not valid YAML: {error}"
        raise ConfigError(msg) from error
    return parse(data if data is not None else {}, model, where=str(path))


def parse(data: Any, model: type[M], where: str) -> M:
    """Check `data` against `model`; `where` (a file name) opens each line of the error."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, model, where)) from error


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """One line per fault; an unknown key is answered with the nearest key valid at that place."""
    lines = []
    for fault in error.errors():
        loc = fault["loc"]
        key = ".".join(str(part) for part in loc)
        if fault["type"] == "extra_forbidden":
            valid = sorted(_fields_at(model, loc[:-1]))
            near = difflib.get_close_matches(str(loc[-1]), valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
            lines.append(f"{where}: unknown key {key!r}; {hint}")
        else:
            whole = fault["type"] == "missing" or isinstance(fault["input"], dict | list)
            whole = whole or any(word in key for word in MAY_HOLD_SECRETS)
            given = "" if whole else f" (given: {fault['input']!r})"
            problem = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {key or 'the file'}: {problem}{given}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> set[str]:
    """The keys valid at `loc`, walking through nested models, lists, dicts and optionals."""
    models: list[type[BaseModel]] = [model]
    for part in loc:
        if isinstance(part, str):
            found = [
                m
                for parent in models
                if part in parent.model_fields
                for m in _models_in(parent.model_fields[part].annotation)
            ]
            models = found or models  # a union tag or a dict key: stay
    return {name for m in models for name in m.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _models_in(arg)]
