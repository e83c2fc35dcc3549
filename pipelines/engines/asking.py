"""What happens to each request on its way to a server: waiting, failing, going again, its answer.

Many requests are under way at a time, each for the samples of one prompt. A request that fails is
given back and tried again; after two failures of its own it is set aside with the reason. What was
under way when a server of our own died is tried again like anything else, and what was under way
twice is tried once more on its own, so that nobody is blamed for a neighbour.

How a request and a reply look is in `wire.py`, how a server is watched in `supervisor.py`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from pipelines.engines import wire
from pipelines.engines.base import Answer, Completion, Request, SetAside
from pipelines.engines.handover import Give
from pipelines.engines.options import AskOptions, Parameter
from pipelines.engines.sampling import SamplingSettings
from pipelines.engines.spending import Entry, Ledger
from pipelines.engines.supervisor import Supervisor
from pipelines.errors import PolicyUnavailableError

if TYPE_CHECKING:
    from pipelines.engines.vllm_server import Server

FAILURES = 2  # of its own, after which a request is set aside
RETRIES = 6  # of a request that meets errors that are the server's
REFUSALS = 8  # before any answer, after which it is the endpoint that is asked wrongly
FIRST_DELAY, LAST_DELAY = 0.5, 60.0
IDLE = 2.0  # seconds until an unused connection is dropped: before servers do, most after 5


@dataclass
class Job:
    """One request to the server: samples of one prompt, and what happened to it so far."""

    requests: list[Request]
    failures: int = 0  # its own
    shared: int = 0  # deaths of the server that it was under way in with others
    retries: int = 0
    waits: int = 0


@dataclass(kw_only=True)
class Endpoint:
    """Where a policy answers, how it wants to be asked, and what it says of itself."""

    model: str
    chat: bool
    url: str = ""  # up to and including /v1; a server of our own knows its own
    key: str | None = field(default=None, repr=False)
    takes: tuple[Parameter, ...] = ("top_k", "seed", "n")
    limit_name: str = "max_tokens"
    extra: dict[str, Any] = field(default_factory=dict)
    opening: str | None = None  # text that opens each prompt, unless it does so already
    version: str = "unknown"  # as the last answer gave it
    context: int | None = None  # tokens of prompt and answer, where the server tells

    def opened(self, prompt: str) -> str:
        """The prompt as it is sent."""
        opening = self.opening or ""
        return prompt if prompt.startswith(opening) else opening + prompt

    def limit(self, sampling: SamplingSettings) -> int:
        """Most new tokens of an answer: a server refuses more than its context holds."""
        most = sampling.max_tokens
        return min(most, self.context - 1) if self.context else most


class Asking:
    """One run through a list of jobs; lives in one event loop."""

    def __init__(
        self,
        endpoint: Endpoint,
        options: AskOptions,
        server: Server | None,
        ledger: Ledger,
        jobs: deque[Job],
        give: Give[Answer],
    ):
        self.endpoint = endpoint
        self.options = options
        self.ours = server is not None
        self.supervisor = Supervisor(server, endpoint.url, options)
        self.ledger = ledger
        self.jobs = jobs
        self.give = give
        self.suspects: list[Job] = []
        self.answered = False
        self.refused = 0
        self.resume_at = 0.0
        self.settled = asyncio.Event()

    async def run(self) -> None:
        """Answer every job, or say why not."""
        key = self.endpoint.key
        async with httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else None,
            timeout=httpx.Timeout(None, connect=10),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE
            ),
            trust_env=not self.ours,
        ) as http:
            count = min(self.options.concurrency, len(self.jobs))
            await _all([self._work(http) for _ in range(count)])
            for job in self.suspects:  # alone, one after the other
                self.supervisor.one_at_a_time()
                while (answers := await self._try(http, job)) is None:
                    pass
                await self.give(answers)

    async def _work(self, http: httpx.AsyncClient) -> None:
        while self.jobs:
            job = self.jobs.popleft()
            answers = await self._try(http, job)
            if answers is not None:
                await self.give(answers)
            elif job.shared >= FAILURES:
                self.suspects.append(job)
            else:
                self.jobs.append(job)

    # --- one request -------------------------------------------------------------------------

    async def _try(self, http: httpx.AsyncClient, job: Job) -> list[Answer] | None:
        """Ask once: the answers, or why there are none for good; None gives the job back."""
        await self._go_ahead()
        entry = await self._enter(job)
        generation = self.supervisor.generation
        try:
            response = await self._send(http, job)
        except (TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout):
            self._settle(entry, None, None)
            return await self._timed_out(job, generation)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._strike(entry)
            return await self._lost(job, generation, error)
        except httpx.TransportError as error:
            self._settle(entry, None, None)
            return await self._lost(job, generation, error)
        except httpx.HTTPError as error:  # a body that does not unpack
            self._settle(entry, None, None)
            return await self._failed(job, "bad_answer", self._said(error))
        if response.status_code == 200:
            return await self._read(job, response, entry)
        if response.status_code >= 500 and response.status_code != 503:
            self._settle(entry, None, None)  # it may have been at work, and charge for it
        else:
            self._strike(entry)
        return await self._status(job, response, generation)

    async def _send(self, http: httpx.AsyncClient, job: Job) -> httpx.Response:
        path = "chat/completions" if self.endpoint.chat else "completions"
        self.supervisor.sent()
        try:
            async with asyncio.timeout(self.options.request_timeout):
                return await http.post(f"{self.supervisor.url}/{path}", json=self._body(job))
        finally:
            self.supervisor.over()

    def _body(self, job: Job) -> dict[str, Any]:
        first, count = job.requests[0], len(job.requests)
        takes = self.endpoint.takes
        said = wire.body(
            self.endpoint.model,
            self.endpoint.opened(first.prompt),
            first.sampling,
            chat=self.endpoint.chat,
            system=first.system,
            n=count,
            seed=wire.seeds(first.seed, count)[0] if "seed" in takes else None,
            limit=self.endpoint.limit(first.sampling),
            limit_name=self.endpoint.limit_name,
            top_k="top_k" in takes,
        )
        return said | self.endpoint.extra

    async def _read(self, job: Job, response: httpx.Response, entry: Entry) -> list[Answer] | None:
        count = len(job.requests)
        try:
            reply = wire.read(response.content, chat=self.endpoint.chat, n=count)
        except wire.NonsenseError as error:
            self._settle(entry, None, None)
            return await self._failed(job, "bad_answer", self._said(error))
        self._settle(entry, reply.prompt_tokens, reply.answer_tokens)
        self.answered = True
        self.supervisor.answered()
        if not self.ours:
            self.endpoint.version = reply.version
        seeds: Sequence[int | None] = [None] * count
        if "seed" in self.endpoint.takes:
            seeds = wire.seeds(job.requests[0].seed, count)
        return [
            SetAside(
                trajectory_id=request.trajectory_id,
                reason="content_filter",
                detail="the endpoint withheld the answer",
            )
            if choice.finish_reason is None
            else Completion(
                trajectory_id=request.trajectory_id,
                text=choice.text,
                tokens=choice.tokens,
                finish_reason=choice.finish_reason,
                seed=seed,
                version=self.endpoint.version,
            )
            for request, choice, seed in zip(job.requests, reply.choices, seeds, strict=True)
        ]

    # --- what can go wrong -------------------------------------------------------------------

    async def _status(
        self, job: Job, response: httpx.Response, generation: int
    ) -> list[Answer] | None:
        """A reply that is no answer: fatal, this request's fault, or a matter of time."""
        status = response.status_code
        message, code = (self._said(part) for part in wire.fault(response.content))
        where = f"{self.supervisor.url} answers {status}"
        if status in (401, 403):
            how = "the key was not accepted" if self.endpoint.key else "it wants a key"
            msg = f"{where}: {how}; set the variable that api_key_env names in the pool file"
            raise PolicyUnavailableError(msg)
        if status == 402 or (status == 429 and "insufficient_quota" in code):
            msg = f"{where}: the account has no money left ({message})"
            raise PolicyUnavailableError(msg)
        if status in (400, 413, 422):
            return self._refused(job, message, code, where)
        if status == 429 or status == 408 or status >= 500:
            return await self._busy(job, response, f"{status}: {message}", generation)
        msg = f"{where}: {message}; correct base_url or the model's name (weights)"
        raise PolicyUnavailableError(msg)

    def _refused(self, job: Job, message: str, code: str, where: str) -> list[Answer]:
        if wire.too_long(message, code):
            return [
                Completion(
                    trajectory_id=request.trajectory_id,
                    text="",
                    tokens=0,
                    finish_reason="prompt_too_long",
                    seed=None,
                )
                for request in job.requests
            ]
        self.refused += 1
        if not self.answered and self.refused >= REFUSALS:
            msg = f"{where} to every request: {message}"
            raise PolicyUnavailableError(msg)
        return _aside(job, "refused", message)

    async def _busy(
        self, job: Job, response: httpx.Response, said: str, generation: int
    ) -> list[Answer] | None:
        """A rate limit, or an error on the server's side: later, for all if it says when."""
        if response.status_code != 429 and await self._died(job, generation):
            return self._after_death(job, said)
        self.supervisor.check_patience(said)
        wait = wire.retry_after(response.headers)
        if wait is not None and wait > self.options.patience:
            msg = f"{self.supervisor.url} asks to wait {wait:,.0f} s, longer than patience ({said})"
            raise PolicyUnavailableError(msg)
        if response.status_code == 429 or wait is not None:
            wait = _delay(job.waits) if wait is None else max(wait, _delay(0))
            job.waits += 1
            self.resume_at = max(self.resume_at, time.monotonic() + wait)
            return None
        return await self._later(job, "server_error", said)

    async def _lost(
        self, job: Job, generation: int, error: httpx.TransportError
    ) -> list[Answer] | None:
        """The connection failed: the server died, or is not there, or dropped it."""
        said = self._said(error) or type(error).__name__
        if await self._died(job, generation):
            return self._after_death(job, said)
        self.supervisor.check_patience(said)
        if not self.ours and isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            await asyncio.sleep(_delay(job.waits))  # nobody there: patience alone decides
            job.waits += 1
            return None
        return await self._later(job, "connection_lost", said)

    async def _timed_out(self, job: Job, generation: int) -> list[Answer] | None:
        said = f"no answer in {self.options.request_timeout:g} s"
        if await self._died(job, generation, timed_out=True):
            return self._after_death(job, said)
        self.supervisor.check_patience(said)
        return await self._failed(job, "timed_out", said)

    async def _later(self, job: Job, reason: str, said: str) -> list[Answer] | None:
        """Not the request's own failure, as far as can be told: again, but not for ever."""
        job.retries += 1
        if job.retries > RETRIES:
            return _aside(job, reason, said)
        await asyncio.sleep(_delay(job.retries))
        return None

    async def _failed(self, job: Job, reason: str, said: str) -> list[Answer] | None:
        job.failures += 1
        if job.failures >= FAILURES:
            return _aside(job, reason, said)
        await asyncio.sleep(_delay(0))
        return None

    async def _died(self, job: Job, generation: int, *, timed_out: bool = False) -> bool:
        """Whether the server died under the job, which is its own failure if it was alone."""
        if not await self.supervisor.died(generation, timed_out=timed_out):
            return False
        if self.supervisor.was_alone(generation):
            job.failures += 1
        else:
            job.shared += 1
        return True

    def _after_death(self, job: Job, said: str) -> list[Answer] | None:
        return _aside(job, "engine_died", said) if job.failures >= FAILURES else None

    # --- waiting and counting ----------------------------------------------------------------

    async def _go_ahead(self) -> None:
        """Wait out a restart and a pause that the endpoint asked for."""
        await self.supervisor.ready()
        while (wait := self.resume_at - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    async def _enter(self, job: Job) -> Entry:
        """Enter the request into the account; waits for others where a cap may be near."""
        first = job.requests[0]
        prompt = (first.system or "") + self.endpoint.opened(first.prompt)
        most = self.endpoint.limit(first.sampling) * len(job.requests)
        while (entry := self.ledger.enter(prompt, most)) is None:
            if not self.ledger.open:
                raise self.ledger.cap_reached()
            self.settled.clear()
            await self.settled.wait()
        return entry

    def _settle(self, entry: Entry, prompt_tokens: int | None, answer_tokens: int | None) -> None:
        if prompt_tokens is None or answer_tokens is None:
            self.ledger.settle_in_full(entry)
        else:
            self.ledger.settle(entry, prompt_tokens, answer_tokens)
        self.settled.set()

    def _strike(self, entry: Entry) -> None:
        self.ledger.strike(entry)
        self.settled.set()

    def _said(self, words: object) -> str:
        """Words of a server or a library, in one line, without the key."""
        text, key = " ".join(str(words).split()), self.endpoint.key
        return (text.replace(key, "***") if key else text)[:300]


def _aside(job: Job, reason: str, said: str) -> list[Answer]:
    return [
        SetAside(trajectory_id=request.trajectory_id, reason=reason, detail=said)
        for request in job.requests
    ]


def _delay(tries: int) -> float:
    """Seconds before trying again: doubled each time, bounded, with jitter."""
    longest = min(FIRST_DELAY * 2 ** min(tries, 20), LAST_DELAY)
    return longest * random.uniform(0.5, 1.0)


async def _all(work: list[Awaitable[None]]) -> None:
    """Wait for all; the first error ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
