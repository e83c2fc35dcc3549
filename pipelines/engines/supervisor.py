"""Watches a server while requests are under way: is it silent, did it die, does it hang.

A server of our own that died or hangs is started again; one that runs elsewhere can only be given
up. The process is in `vllm_server.py`; what becomes of the requests in `asking.py`.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from pipelines.engines.options import AskOptions
from pipelines.errors import PolicyUnavailableError

if TYPE_CHECKING:
    from pipelines.engines.vllm_server import Server

DEATHS = 5  # of a server without an answer in between, after which it is given up
POLL = 0.25


class Supervisor:
    """One server and the requests that it has under way; lives in one event loop."""

    def __init__(self, server: Server | None, url: str, options: AskOptions):
        """Watch a server of our own that runs, or where there is none the one at the address."""
        self.options = options
        self._server = server
        self._url = url
        self._under_way = 0
        self._company: dict[int, int] = {}  # most others under way when one failed, by generation
        self._deaths = 0
        self._last_sign = time.monotonic()
        self._restarting = asyncio.Lock()

    @property
    def url(self) -> str:
        """Where it answers now, up to and including /v1."""
        return f"{self._server.url}/v1" if self._server else self._url

    @property
    def generation(self) -> int:
        """How often it was started; 0 where it runs elsewhere."""
        return self._server.generation if self._server else 0

    async def ready(self) -> None:
        """Wait for the end of a restart."""
        async with self._restarting:
            pass

    def sent(self) -> None:
        """A request is under way."""
        self._under_way += 1

    def over(self) -> None:
        """It is not any more."""
        self._under_way -= 1

    def answered(self) -> None:
        """It was a good answer."""
        self._deaths, self._last_sign = 0, time.monotonic()

    def check_patience(self, said: str) -> None:
        """Refuse to wait longer than `patience` for any answer; `said` is the last word."""
        silent = time.monotonic() - self._last_sign
        if silent > self.options.patience:
            msg = f"{self.url}: no answer for {silent:,.0f} s, the last word was: {said}"
            raise PolicyUnavailableError(msg)

    def one_at_a_time(self) -> None:
        """The next request goes alone, and is judged for itself."""
        self._deaths = 0
        self._company.clear()

    def was_alone(self, generation: int) -> bool:
        """Whether no other request was under way when one failed under that generation."""
        return not self._company[generation]

    async def died(self, generation: int, *, timed_out: bool = False) -> bool:
        """Whether our server died under a request that failed, or hangs; it runs again then.

        Args:
            generation: of the server that took the request.
            timed_out: the request's answer did not come in time. It is late for itself if another
                answer comes; where none does for as long as one may take, the server hangs.

        Raises:
            PolicyUnavailableError: it died again and again, or does not start.
        """
        if self._server is None:
            return False
        self._company[generation] = max(self._company.get(generation, 0), self._under_way)
        hangs = timed_out and await self._silent(generation)
        async with self._restarting:
            if self._server.generation != generation:
                return True
            if not hangs and await asyncio.to_thread(self._server.healthy):
                return False
            self._deaths += 1
            if self._deaths > DEATHS:
                msg = (
                    f"vLLM died or hung {DEATHS} times without an answer in between; see "
                    f"{self._server.log} (a request_timeout that is too short looks like this)"
                )
                raise PolicyUnavailableError(msg)
            await asyncio.to_thread(self._server.restart)
            self._last_sign = time.monotonic()
        return True

    async def _silent(self, generation: int) -> bool:
        """Wait for the next answer, or until there was none for as long as one may take."""
        seen = self._last_sign
        while self._last_sign == seen and self.generation == generation:
            left = seen + self.options.request_timeout - time.monotonic()
            if left <= 0:
                return True
            await asyncio.sleep(min(left, POLL))
        return False
