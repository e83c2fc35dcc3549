"""The section `prompt_sources` of a configuration: which files prompts come from, and how many.

What is done with it is in `prompt_sources.py`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.settings import Settings

NAME = r"^[a-z0-9][a-z0-9_-]*$"


class PromptFile(Settings):
    """One collection: files of documents or of instructions, and how many of them are drawn."""

    name: str = Field(pattern=NAME)
    path: str = Field(min_length=1, description="file, folder or pattern, relative to this file")
    kind: Literal["documents", "instructions"]
    column: str | None = Field(default=None, description="documents: text; instructions: by format")
    category: str | None = Field(default=None, description="column of it; default: the name")
    limit: int | None = Field(default=None, ge=1, description="prompts drawn; default: all")
    licence: str | None = None


class EvaluationFile(Settings):
    """One evaluation set that no prompt may come from."""

    name: str = Field(pattern=NAME)
    path: str = Field(min_length=1)
    columns: tuple[str, ...] = Field(default=(), description="default: what is asked, by format")


class PromptSources(Settings):
    """The section `prompt_sources`: where prompts come from, for pools of real policies."""

    files: tuple[PromptFile, ...] = Field(min_length=1)
    tokenizer: str | None = Field(
        default=None, description="counts prefixes: a folder, one under policies/, or a hub name"
    )
    prefix_tokens: tuple[int, int] = Field(default=(1, 1024), description="paper: 1 to 1,024")
    seed: int = 0
    max_characters: int = Field(default=500_000, ge=1, description="of a row; longer ones are bad")
    near: float = Field(default=0.8, gt=0, le=0.95, description="Jaccard of near-equal prompts")
    evaluation: tuple[EvaluationFile, ...] = Field(default=(), description="kept out of prompts")
    shared_words: int = Field(default=13, ge=2, description="a run that counts as known")

    @field_validator("files", "evaluation")
    @classmethod
    def _names(cls, files: tuple[Any, ...]) -> tuple[Any, ...]:
        for name, times in Counter(file.name for file in files).items():
            if times > 1:
                msg = f"{times} are named {name!r}; give each its own name"
                raise ValueError(msg)
        return files

    @model_validator(mode="after")
    def _whole(self) -> PromptSources:
        low, high = self.prefix_tokens
        if not 1 <= low <= high:
            msg = f"prefix_tokens is {low} to {high}; give the fewest and the most, from 1"
            raise ValueError(msg)
        if self.tokenizer is None and any(file.kind == "documents" for file in self.files):
            msg = "documents need a `tokenizer`, for their beginnings are counted in its tokens"
            raise ValueError(msg)
        return self
