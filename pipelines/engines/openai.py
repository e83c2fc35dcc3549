"""Answers from any server that speaks the OpenAI protocol: vLLM, SGLang, a vendor's endpoint.

What happens to each request on its way is in `asking.py`, what is spent in `spending.py`, how a
server is watched in `supervisor.py`, a server of our own in `vllm_server.py`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Coroutine, Generator, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pipelines.engines.asking import Asking, Endpoint, Job
from pipelines.engines.base import Answer, Request
from pipelines.engines.handover import Give, handed_over
from pipelines.engines.options import AskOptions
from pipelines.engines.spending import Ledger, Usage
from pipelines.errors import PolicyUnavailableError

if TYPE_CHECKING:
    from pipelines.engines.vllm_server import Server


class OpenAIEngine:
    """One policy behind an endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        options: AskOptions,
        *,
        name: str = "openai",
        server: Server | None = None,
        ledger: Ledger | None = None,
    ):
        """Prepare; nothing is sent, and no server started, before there is something to ask."""
        self.name = name
        self.endpoint = endpoint
        self.options = options
        self.server = server
        self.ledger = ledger or Ledger(None, None)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request

    @property
    def version(self) -> str:
        """Of the server, as its last answer gave it."""
        return self.endpoint.version

    @property
    def chat(self) -> bool:
        """Whether the endpoint is sent messages."""
        return self.endpoint.chat

    @property
    def usage(self) -> Usage:
        """What this engine's requests used."""
        return self.ledger.now

    def stream(self, requests: Sequence[Request], at_once: int) -> Generator[list[Answer]]:
        """Answer all requests as the answers come; `at_once` does not matter here.

        Raises:
            PolicyUnavailableError: a bad key, a model that is not there, a server that does not
                start, dies again and again or is silent for longer than `patience`.
            CapReachedError: another request could pass a cap.
        """
        jobs = deque(self._jobs(requests))
        if not jobs:
            return
        if self.server:
            self.server.start()
            self.endpoint.version, self.endpoint.context = self.server.describe()

        def work(give: Give[Answer]) -> Coroutine[Any, Any, None]:
            return Asking(self.endpoint, self.options, self.server, self.ledger, jobs, give).run()

        yield from handed_over(work, self.server.give_up if self.server else None)

    def close(self) -> None:
        """Stop the server, close the account."""
        self.ledger.close()
        if self.server:
            self.server.stop()

    def _jobs(self, requests: Sequence[Request]) -> Iterator[Job]:
        """Samples of one prompt that follow on each other go into one request."""
        most = self.options.samples_per_request if "n" in self.endpoint.takes else 1
        for _, group in groupby(requests, key=lambda one: (one.system, one.prompt, one.sampling)):
            samples = list(group)
            self._check_sampling(samples[0])
            for at in range(0, len(samples), most):
                yield Job(samples[at : at + most])

    def _check_sampling(self, request: Request) -> None:
        if request.sampling.top_k and "top_k" not in self.endpoint.takes:
            msg = (
                f"the endpoint of {self.endpoint.model} takes no top_k, and top_k is "
                f"{request.sampling.top_k}: set rollouts.sampling.top_k to 0 (for all policies, "
                "since answers are compared under one sampling)"
            )
            raise PolicyUnavailableError(msg)
