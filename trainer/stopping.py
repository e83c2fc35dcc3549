"""Ctrl-C waits for the end of a step, so that what was learned can be saved before it is obeyed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_back(hold: bool = True) -> Iterator[Callable[[], bool]]:
    """Hold the first signal to stop back until this context ends; a second one acts at once.

    Yields whether one has come. It is delivered at the end to whoever would have had it, Python or
    an orchestrator. Nothing is held outside the main thread, where Python cannot, nor a signal that
    is ignored.

    Args:
        hold: False changes nothing, for a process that others wait for and would be killed.

    Raises:
        KeyboardInterrupt: one has come, and who would have had it raised nothing.
    """
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS if hold and main}
    before = {n: handler for n, handler in before.items() if handler not in (None, signal.SIG_IGN)}

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: object) -> None:
        came.append(number)
        give_back()

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        give_back()
        if came:
            signal.raise_signal(came[0])
            raise KeyboardInterrupt
