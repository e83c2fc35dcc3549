"""From an event loop in a thread of its own to a plain iterator, item by item.

The loop goes on while the caller works, but who gave an item waits until the caller, by asking for
more, says that it has it in safety. Nothing here knows what the items are.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
Give = Callable[[list[T]], Awaitable[None]]


def handed_over(
    work: Callable[[Give[T]], Coroutine[Any, Any, None]],
    give_up: Callable[[], None] | None = None,
) -> Generator[list[T]]:
    """Run `work` in an event loop and yield what it gives, as much at a time as is there.

    Args:
        work: called with `give`; awaiting `give(items)` ends when the caller has them.
        give_up: called when the caller stops before the end, to end waits that are no coroutines.

    Raises:
        Exception: whatever `work` raised, after all that it gave before.
    """
    given: queue.SimpleQueue[tuple[list[T], asyncio.Future[None]] | BaseException | None]
    given = queue.SimpleQueue()
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - inside a coroutine there is one
        started.set_result((loop, task))

        async def give(items: list[T]) -> None:
            taken = loop.create_future()
            given.put((items, taken))
            await taken

        await work(give)

    def in_thread() -> None:
        try:
            asyncio.run(main())
            given.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            given.put(error)

    thread = threading.Thread(target=in_thread, name="asking", daemon=True)
    thread.start()
    finished = False
    try:
        while not finished:
            taken, items, end = _take(given)
            if items:
                yield items
            if taken:
                with suppress(RuntimeError):  # the loop is closed: it ended with an error
                    started.result()[0].call_soon_threadsafe(_release, taken)
            finished = end is not _GOES_ON
            if isinstance(end, BaseException):
                raise end
    finally:
        if not finished:
            if give_up:
                give_up()
            loop, task = started.result()
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)
        thread.join()


_GOES_ON = object()


def _take(given: queue.SimpleQueue[Any]) -> tuple[list[asyncio.Future[None]], list[Any], object]:
    """All that is there, at least one thing; and whether that is the end, or an error."""
    waiting: list[asyncio.Future[None]] = []
    items: list[Any] = []
    entry = given.get()
    while True:
        if entry is None or isinstance(entry, BaseException):
            return waiting, items, entry
        items += entry[0]
        waiting.append(entry[1])
        try:
            entry = given.get_nowait()
        except queue.Empty:
            return waiting, items, _GOES_ON


def _release(waiting: list[asyncio.Future[None]]) -> None:
    for taken in waiting:
        if not taken.done():
            taken.set_result(None)
