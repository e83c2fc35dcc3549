"""A signal to stop waits for the end of a step, and then reaches whoever would have had it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest

from tests.trainer.conftest import handled
from trainer.stopping import held_back


class OrchestratorError(BaseException):
    pass


def raising(_number: int, _frame: object) -> None:
    raise OrchestratorError


def run(done: list[str], *numbers: int, hold: bool = True) -> None:
    """A step in which signals come; `done` is what it does before them and after each."""
    with held_back(hold) as stopped:
        done.append("begun")
        for number in numbers:
            signal.raise_signal(number)
            done.append(f"stopped: {stopped()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_and_then_reaches_who_would_have_had_it(number: int):
    done: list[str] = []
    with handled(number, raising), pytest.raises(OrchestratorError):
        run(done, number)
    assert done == ["begun", "stopped: True"]


def test_a_handler_that_raises_nothing_does_not_let_training_end_as_if_it_were_done():
    seen: list[int] = []
    with handled(signal.SIGINT, lambda number, _: seen.append(number)):
        with pytest.raises(KeyboardInterrupt):
            run([], signal.SIGINT)
        assert seen == [signal.SIGINT]


def test_a_second_signal_acts_at_once():
    done: list[str] = []
    with handled(signal.SIGINT, raising), pytest.raises(OrchestratorError):
        run(done, signal.SIGINT, signal.SIGINT)
    assert done == ["begun", "stopped: True"]


def test_an_ignored_signal_stays_ignored_and_without_one_nothing_happens():
    with handled(signal.SIGINT, signal.SIG_IGN), held_back() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert not stopped()


def test_a_process_that_others_wait_for_is_stopped_at_once():
    done: list[str] = []
    with handled(signal.SIGINT, raising), pytest.raises(OrchestratorError):
        run(done, signal.SIGINT, hold=False)
    assert done == ["begun"]


def test_outside_the_main_thread_nothing_is_held():
    answers: list[Callable[[], bool]] = []

    def elsewhere() -> None:
        with held_back() as stopped:
            answers.append(stopped)

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not answers[0]()
    assert signal.getsignal(signal.SIGINT) is handler
