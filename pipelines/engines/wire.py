"""The OpenAI protocol as plain functions: what a request says, what a reply must hold.

No connection is made here, and nothing is decided about trying again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from pipelines.engines.base import FinishReason
from pipelines.engines.sampling import SamplingSettings

# What vLLM would otherwise take from a model's own generation settings, set to have no effect.
NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "return_token_ids": True,
}
LARGEST_SEED = 2**63 - 1
_TOO_LONG = re.compile(
    r"maximum context length|context_length_exceeded|prompt is too long|input is too long"
    r"|longer than the (model'?s )?(maximum )?context|exceeds? (the )?(model'?s )?context",
    re.IGNORECASE,
)


class NonsenseError(Exception):
    """A reply that says it is one and is none; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer of a reply; `tokens` before a stop token, where the reply tells."""

    text: str
    finish_reason: FinishReason | None  # None: the endpoint withheld the answer
    tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """All answers of a reply in the order of their indices, and what it used, where it tells."""

    choices: list[Choice]
    prompt_tokens: int | None
    answer_tokens: int | None
    version: str


def body(
    model: str,
    prompt: str,
    sampling: SamplingSettings,
    *,
    chat: bool,
    n: int,
    seed: int | None,
    limit: int,
    limit_name: str = "max_tokens",
    top_k: bool = True,
    system: str | None = None,
) -> dict[str, Any]:
    """A request for `n` answers to one prompt.

    One prompt only: vLLM gives several prompts under one seed the same samples, while `n` samples
    of one prompt are drawn with the seeds that follow on `seed`.
    """
    said: dict[str, Any] = {
        "model": model,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        limit_name: limit,
    }
    if chat:
        before = [] if system is None else [{"role": "system", "content": system}]
        said["messages"] = [*before, {"role": "user", "content": prompt}]
    else:
        said["prompt"] = prompt
    if top_k:
        said["top_k"] = sampling.top_k
    if n > 1:
        said["n"] = n
    if seed is not None:
        said["seed"] = seed
    return said


def read(data: bytes, *, chat: bool, n: int) -> Reply:
    """Read a reply to a request for `n` answers.

    Raises:
        NonsenseError: it is not JSON, holds another number of answers, or an answer lacks its text
            or says no known reason for its end.
    """
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        msg = f"not JSON: {_excerpt(data)}"
        raise NonsenseError(msg) from None
    choices = said.get("choices") if isinstance(said, dict) else None
    if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
        msg = f"no list of choices: {_excerpt(data)}"
        raise NonsenseError(msg)
    if len(choices) != n:
        msg = f"{len(choices)} answers for {n} that were asked for"
        raise NonsenseError(msg)
    by_index = {one.get("index", 0 if n == 1 else None): one for one in choices}
    if set(by_index) != set(range(n)):
        msg = f"answers are numbered {[one.get('index') for one in choices]}, not 0 to {n - 1}"
        raise NonsenseError(msg)
    usage = said.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    used = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    read_choices = [_choice(by_index[i], chat=chat, alone=used[1] if n == 1 else None)
                    for i in range(n)]  # fmt: skip
    named = [said.get("model"), said.get("system_fingerprint")]
    version = " ".join(name for name in named if isinstance(name, str))
    return Reply(
        choices=read_choices,
        prompt_tokens=used[0],
        answer_tokens=used[1],
        version=version or "unknown",
    )


def _choice(said: Mapping[str, Any], *, chat: bool, alone: int | None) -> Choice:
    finish = said.get("finish_reason")
    if finish == "content_filter":
        return Choice(text="", finish_reason=None, tokens=None)
    message = said.get("message") if chat else said
    key = "content" if chat else "text"
    text = message.get(key) if isinstance(message, dict) else None
    if not isinstance(text, str):
        msg = f"an answer has no text ({key} is {type(text).__name__})"
        raise NonsenseError(msg)
    if finish not in ("stop", "length"):
        msg = f"an answer ended for the unknown reason {finish!r}"
        raise NonsenseError(msg)
    drawn = said.get("token_ids")
    tokens = len(drawn) - (finish == "stop") if isinstance(drawn, list) else alone
    return Choice(text=_valid(text), finish_reason=finish, tokens=tokens)


def fault(data: bytes) -> tuple[str, str]:
    """The message and the code of an error reply, as far as there are any."""
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return _excerpt(data), ""
    error = said.get("error", said) if isinstance(said, dict) else said
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or json.dumps(error)
        return str(message)[:500], f"{error.get('code')} {error.get('type')}"
    return str(error)[:500], ""


def too_long(message: str, code: str) -> bool:
    """Whether a refusal says that the prompt leaves no room in the context."""
    return bool(_TOO_LONG.search(message) or "context_length" in code)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a reply asks to wait; a date is read against the reply's own, not our clock."""
    said = headers.get("retry-after", "").strip()
    try:
        return max(float(said), 0.0) if said else None
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(said)
        dated = headers.get("date")
        now = parsedate_to_datetime(dated) if dated else datetime.now(UTC)
        return max((until - now).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None


def seeds(first: int, count: int) -> Sequence[int]:
    """The seeds of the `count` samples of one request, which is sent the first of them."""
    start = min(first, LARGEST_SEED - count)
    return range(start, start + count)


def _valid(text: str) -> str:
    """Text that UTF-8 can hold: halves of surrogate pairs become replacement characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _excerpt(data: bytes) -> str:
    text = " ".join(data[:400].decode(errors="replace").split())
    return repr(text[:200])
