"""What every engine that makes answers has in common: a request, a completion, the protocol.

No engine lives here, and nothing of what happens to an answer afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pipelines.engines.sampling import SamplingSettings

FinishReason = Literal["stop", "length", "prompt_too_long"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer wanted: the model's input text, already rendered, and how to draw it."""

    trajectory_id: bytes
    prompt: str
    seed: int
    sampling: SamplingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer: its text without special tokens and `tokens`, those drawn before a stop token.

    `finish_reason` is `stop` (the policy ended it), `length` (`max_tokens` or the context did) or
    `prompt_too_long` (the prompt leaves no room in the context: nothing was drawn).
    """

    trajectory_id: bytes
    text: str
    tokens: int
    finish_reason: FinishReason


class Engine(Protocol):
    """Something that answers for one policy, whatever runs the weights."""

    @property
    def name(self) -> str:
        """As the trajectories' column `engine` gives it."""

    @property
    def version(self) -> str:
        """Of the software that computes."""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together that the policy takes."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer one batch, in the order of the requests.

        An answer depends on its request alone, up to the arithmetic of the engine, never on what
        else is in the batch.

        Raises:
            PolicyUnavailableError: the policy cannot answer.
        """

    def close(self) -> None:
        """Let weights and connections go."""
