"""Prompts: their ids, their groups of equal and near-equal ones, and the side of a split.

Every source of prompts ends in `prompts_table`. Where prompts come from (a file, the embedded
world) and who answers them is said elsewhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from pipelines import ids, schemas
from pipelines.errors import BadInputError
from pipelines.settings import Settings


class SplitSettings(Settings):
    """Shares of prompt groups and policy groups held out, 0..1, and the seed of the draw."""

    prompt_test_share: float = Field(default=0.17, ge=0, le=1)
    policy_test_share: float = Field(default=0.2, ge=0, le=1)
    seed: int = 0


def prompt_id(source: str, key: str) -> bytes:
    """The id of the prompt that its source calls `key`."""
    return ids.content_id("prompt", source, key)


def text_key(text: str) -> str:
    """A `source_key` for a prompt that its source gives no name."""
    return "text:" + ids.content_id("text", text).hex()


def side(kind: Literal["prompt", "policy"], group: str, settings: SplitSettings) -> str:
    """`train` or `test`, by the hash of a prompt group or policy group.

    The group's name alone decides, whatever source it occurs in: one group in two sources is on
    one side in both.
    """
    share = settings.prompt_test_share if kind == "prompt" else settings.policy_test_share
    return "test" if ids.on_side(kind, group, share, settings.seed) else "train"


def normalised(text: str) -> str:
    """What near-equal prompts share: words alone, without case, punctuation or layout.

    >>> normalised("What  is 2 + 2?")
    'what is 2 2'
    """
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(words) or " ".join(text.split())


def text_group(text: str) -> str:
    """The prompt group of a prompt whose source names none."""
    return "text:" + ids.content_id("prompt_group", normalised(text)).hex()


def system_turn(messages: Iterable[Mapping[str, str]] | None) -> str | None:
    """What the system says, among the turns of a prompt."""
    return next((turn["content"] for turn in messages or () if turn["role"] == "system"), None)


def prompts_table(rows: Iterable[Mapping[str, Any]], settings: SplitSettings) -> pa.Table:
    """The `prompts` table of plain rows.

    A row holds `source`, `source_key` and `text`, and may hold `kind` (default: instruction),
    `messages`, `category`, `prompt_group`, `reference` and `licence`. A prompt without a group
    joins the group of a prompt whose normalised text it shares, else it gets `text_group`.

    Raises:
        BadInputError: two rows have one source and key.
    """
    rows = list(rows)
    named = {
        normalised(row["text"]): row["prompt_group"] for row in rows if row.get("prompt_group")
    }
    found: dict[bytes, dict[str, Any]] = {}
    for row in rows:
        key = prompt_id(row["source"], row["source_key"])
        if key in found:
            msg = f"prompt {row['source_key']!r} of source {row['source']!r} occurs twice"
            raise BadInputError(msg)
        text = row["text"]
        group = row.get("prompt_group") or named.get(normalised(text)) or text_group(text)
        found[key] = {
            **row,
            "prompt_id": key,
            "kind": row.get("kind") or "instruction",
            "prompt_group": group,
            "split": side("prompt", group, settings),
        }
    return pa.Table.from_pylist(list(found.values()), schema=schemas.PROMPTS.schema)
