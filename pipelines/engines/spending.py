"""Tokens and money: what was spent, what requests under way may still cost, and the caps.

A request is entered with the most it can cost before it is sent, and with what it did cost when the
answer is there; so a cap is never passed, whatever happens in between. What was entered and never
settled (a killed run, an answer that did not come) counts as spent in full. Nothing of requests or
answers themselves is kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pipelines.engines.options import OpenAIOptions
from pipelines.errors import PolicyUnavailableError

MILLION = 1_000_000
OVERHEAD = 64  # tokens that a chat template may add to a prompt


class CapReachedError(PolicyUnavailableError):
    """Another request could pass the cap on tokens or money; what was made is good."""


@dataclass(kw_only=True)
class Usage:
    """Requests that were answered or may have been, their tokens, and what they cost."""

    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        """Of prompts and answers."""
        return self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True)
class Entry:
    """The most that one request can use."""

    number: int
    prompt_tokens: int
    answer_tokens: int
    cost: float


class Ledger:
    """The account of one policy at one endpoint, kept in a file over all runs."""

    def __init__(self, path: Path | None, options: OpenAIOptions | None):
        """Read what earlier runs spent.

        Args:
            path: of the account, or None to keep it for this run only.
            options: prices and caps; None for an engine of our own, which costs nothing.
        """
        self.options = options
        self.open: dict[int, Entry] = {}
        self.before = _read(path) if path else Usage()
        self.now = Usage()
        self._number = 0
        self._added = OVERHEAD
        self._file = None
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".tmp")
            total = {"total": vars(self.before)}
            unfinished.write_text(json.dumps(total) + "\n", encoding="utf-8")
            unfinished.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def enter(self, prompt: str, answer_tokens: int) -> Entry | None:
        """Enter a request before it is sent; None when it could pass a cap.

        A token is at least one byte of UTF-8, so the bytes of a prompt bound its tokens; what an
        endpoint adds to a prompt is learnt from what it says was used.
        """
        prompt_tokens = len(prompt.encode()) + self._added
        cost = self._cost(prompt_tokens, answer_tokens)
        entry = Entry(self._number, prompt_tokens, answer_tokens, cost)
        if not self._fits(entry):
            return None
        self._number += 1
        self.open[entry.number] = entry
        self._write({"enter": entry.number, "most": [prompt_tokens, answer_tokens, cost]})
        return entry

    def settle(self, entry: Entry, prompt_tokens: int, answer_tokens: int) -> None:
        """Replace an entry by what the request used."""
        del self.open[entry.number]
        self._added += max(prompt_tokens - entry.prompt_tokens, 0)
        cost = self._cost(prompt_tokens, answer_tokens)
        _add(self.now, prompt_tokens, answer_tokens, cost)
        self._write({"settle": entry.number, "used": [prompt_tokens, answer_tokens, cost]})

    def settle_in_full(self, entry: Entry) -> None:
        """Nobody knows what the request used: it counts with the most it can have."""
        self.settle(entry, entry.prompt_tokens, entry.answer_tokens)

    def strike(self, entry: Entry) -> None:
        """The request was not served: it costs nothing."""
        del self.open[entry.number]
        self._write({"strike": entry.number})

    def cap_reached(self) -> CapReachedError:
        """The error that says which cap the next request could pass."""
        spent, options = self._spent(), self.options
        assert options is not None  # noqa: S101 - only caps refuse
        said = [f"{spent.tokens:,} tokens used"]
        if options.max_tokens_in_all is not None:
            said.append(f"max_tokens_in_all {options.max_tokens_in_all:,}")
        if options.max_cost is not None:
            said.append(f"{spent.cost:,.4f} spent, max_cost {options.max_cost:,.4f}")
        msg = (
            f"stopped before a cap is passed: {', '.join(said)}; what was made is kept; raise the "
            "cap in the pool file and run again for the rest"
        )
        return CapReachedError(msg)

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None

    def _fits(self, entry: Entry) -> bool:
        if self.options is None:
            return True
        spent = self._spent()
        for other in (*self.open.values(), entry):
            _add(spent, other.prompt_tokens, other.answer_tokens, other.cost)
        most_tokens, most_cost = self.options.max_tokens_in_all, self.options.max_cost
        return (most_tokens is None or spent.tokens <= most_tokens) and (
            most_cost is None or spent.cost <= most_cost
        )

    def _spent(self) -> Usage:
        spent = Usage(**vars(self.before))
        spent.requests += self.now.requests
        spent.prompt_tokens += self.now.prompt_tokens
        spent.answer_tokens += self.now.answer_tokens
        spent.cost += self.now.cost
        return spent

    def _cost(self, prompt_tokens: int, answer_tokens: int) -> float:
        if self.options is None:
            return 0.0
        price_prompt, price_answer = self.options.price_prompt or 0, self.options.price_answer or 0
        return (prompt_tokens * price_prompt + answer_tokens * price_answer) / MILLION

    def _write(self, line: dict[str, object]) -> None:
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def _add(usage: Usage, prompt_tokens: int, answer_tokens: int, cost: float) -> None:
    usage.requests += 1
    usage.prompt_tokens += prompt_tokens
    usage.answer_tokens += answer_tokens
    usage.cost += cost


def _read(path: Path) -> Usage:
    """All that earlier runs used; entries that were never settled count in full."""
    usage = Usage()
    entered: dict[int, tuple[int, int, float]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for at, line in enumerate(lines):
        try:
            said = json.loads(line)
        except ValueError as error:
            if at == len(lines) - 1:
                continue  # its writer was killed over it, before the request was sent
            msg = f"{path}: line {at + 1} is damaged; mend it, or remove the file to start at zero"
            raise PolicyUnavailableError(msg) from error
        if "total" in said:
            usage = Usage(**said["total"])
        elif "enter" in said:
            entered[said["enter"]] = tuple(said["most"])
        elif "settle" in said:
            entered.pop(said["settle"])
            _add(usage, *said["used"])
        else:
            entered.pop(said["strike"])
    for most in entered.values():
        _add(usage, *most)
    return usage
