"""What every engine that makes answers has in common: a request, a completion, the protocol.

No engine lives here, and nothing of what happens to an answer afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pipelines.engines.sampling import SamplingSettings

FinishReason = Literal["stop", "length", "prompt_too_long"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer wanted: the model's input text, already rendered, and how to draw it.

    `system` is a message before it, which only an engine whose `chat` is true can be sent.
    """

    trajectory_id: bytes
    prompt: str
    seed: int
    sampling: SamplingSettings
    system: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer: its text without special tokens and `tokens`, those drawn before a stop token.

    `finish_reason` is `stop` (the policy ended it), `length` (`max_tokens` or the context did) or
    `prompt_too_long` (the prompt leaves no room in the context: nothing was drawn). `tokens` is
    None where the engine does not tell them by answer. `seed` is what the engine was given: the
    request's own, another that was derived from it, or None where it takes none. `version` says
    what answered where that can differ from answer to answer.
    """

    trajectory_id: bytes
    text: str
    tokens: int | None
    finish_reason: FinishReason
    seed: int | None
    version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """One answer that cannot be had: `reason` is a word that can be counted, `detail` says why."""

    trajectory_id: bytes
    reason: str
    detail: str


Answer = Completion | SetAside

PASSING = ("connection_lost", "server_error")
"""Reasons of the server's, not of the request's: another day it may be answered."""


class Engine(Protocol):
    """Something that answers for one policy, whatever runs the weights."""

    @property
    def name(self) -> str:
        """As the trajectories' column `engine` gives it."""

    @property
    def version(self) -> str:
        """Of the software that computes; known once the first answer is there."""

    @property
    def chat(self) -> bool:
        """Whether it is sent messages, among which a system turn has its place."""

    def stream(self, requests: Sequence[Request], at_once: int) -> Generator[list[Answer]]:
        """Answer all requests, in any order, each as soon as it is there.

        An engine that computes in batches makes `at_once` at a time. The caller has what it was
        given in safety when it asks for more: an engine that keeps many requests under way counts
        those not yet asked beyond as under way.

        Raises:
            PolicyUnavailableError: the policy cannot answer; what was handed over is good.
        """

    def close(self) -> None:
        """Let weights, servers and connections go."""


def in_batches(
    generate: Callable[[Sequence[Request]], list[Completion]],
    requests: Sequence[Request],
    at_once: int,
) -> Generator[list[Answer]]:
    """The stream of an engine that answers batch by batch."""
    for at in range(0, len(requests), at_once):
        yield [*generate(requests[at : at + at_once])]
