"""Signals stop a loop after its step, and at once when they insist."""

import os
import signal
import threading

import pytest

from effml_common.errors import Interrupted
from effml_common.interrupt import StopSignal

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("signum", SIGNALS)
def test_the_first_signal_lets_the_step_finish(signum: int, capfd) -> None:
    steps = []

    def loop() -> None:
        with StopSignal() as stop:
            for step in range(5):
                if step == 2:
                    os.kill(os.getpid(), signum)
                steps.append((step, stop.requested))
                stop.check()

    with pytest.raises(Interrupted) as caught:
        loop()
    assert steps == [(0, False), (1, False), (2, True)]
    assert caught.value.signum == signum
    assert "--resume auto" in str(caught.value)
    assert capfd.readouterr().err.count("stopping after this step") == 1


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_second_signal_of_the_same_kind_stops_at_once(signum: int) -> None:
    with StopSignal():
        os.kill(os.getpid(), signum)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signum)


def test_the_previous_handlers_are_back_afterwards() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with StopSignal():
        assert [signal.getsignal(signum) for signum in SIGNALS] != before
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_outside_the_main_thread_it_does_nothing() -> None:
    before, seen = [signal.getsignal(signum) for signum in SIGNALS], []

    def work() -> None:
        with StopSignal() as stop:
            stop.check()
            seen.append(not stop.requested)
            seen.append([signal.getsignal(signum) for signum in SIGNALS] == before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, True]


def test_no_ordinary_except_clause_swallows_an_interruption() -> None:
    assert not issubclass(Interrupted, Exception)
    assert issubclass(Interrupted, KeyboardInterrupt)
