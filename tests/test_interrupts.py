"""Exceptions of signal handlers wait for a safe place; handlers themselves run at once."""

# ruff: noqa: PT012 (what is interrupted is a block)

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from autopipe.interrupts import SIGNALS, deferred, is_deferred, raise_deferred, waking

if threading.current_thread() is not threading.main_thread():
    pytest.skip("signals go to the main thread", allow_module_level=True)


@pytest.fixture(autouse=True)
def _handlers_are_as_before() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    try:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt(signum: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), signum)


def test_an_interrupt_waits_for_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred():
        interrupt()
        done.append(is_deferred())
    assert done == [True]
    assert not is_deferred()


def test_an_interrupt_waits_for_a_safe_place() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred():
        interrupt()
        done.append(1)
        raise_deferred()
        done.append(2)
    assert done == [1]


def test_only_the_outermost_raises() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred():
        with deferred():
            interrupt()
        done.append(1)
    assert done == [1]


def test_a_second_interrupt_does_not_wait() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred():
        interrupt()
        done.append(1)
        interrupt()
        done.append(2)
    assert done == [1]
    assert not is_deferred()


def test_a_handler_that_does_not_raise_runs_at_once_and_interrupts_nothing() -> None:
    calls: list[int] = []
    signal.signal(signal.SIGINT, lambda signum, frame: calls.append(signum))
    try:
        with deferred():
            interrupt()
            assert calls == [signal.SIGINT]
            assert not is_deferred()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_timeout_of_the_user_waits_too() -> None:
    def expired(signum: int, frame: object) -> None:
        raise TimeoutError("too slow")

    before = signal.signal(signal.SIGALRM, expired)
    try:
        with pytest.raises(TimeoutError, match="too slow"), deferred():
            interrupt(signal.SIGALRM)
            assert is_deferred()
        assert signal.getsignal(signal.SIGALRM) is expired
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_handler_that_is_set_within_stays() -> None:
    def own(signum: int, frame: object) -> None:
        raise SystemExit(4)

    with deferred():
        signal.signal(signal.SIGINT, own)
    assert signal.getsignal(signal.SIGINT) is own
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_error_and_an_interrupt() -> None:
    """The interrupt wins; the error is its context."""
    with pytest.raises(KeyboardInterrupt) as caught, deferred():
        interrupt()
        raise ValueError("meanwhile")
    assert isinstance(caught.value.__context__, ValueError)


def test_what_the_main_thread_waits_for_is_woken() -> None:
    woken = threading.Event()
    with pytest.raises(KeyboardInterrupt), deferred(), waking(woken.set):
        threading.Timer(0.05, interrupt).start()
        assert woken.wait(10)
    woken.clear()
    with pytest.raises(KeyboardInterrupt), deferred():
        interrupt()
        with waking(woken.set):  # it came before
            assert woken.is_set()


def test_a_second_interrupt_does_not_cut_short_what_wakes() -> None:
    """It would leave others waiting; after that, it is not deferred."""
    ended = []

    def wake() -> None:
        interrupt()
        ended.append(True)

    with pytest.raises(KeyboardInterrupt), deferred(), waking(wake):
        interrupt()
        assert ended == [True]
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert ended == [True]


def test_other_threads_defer_nothing() -> None:
    seen = []

    def other() -> None:
        with deferred(), waking(lambda: seen.append("woken")):
            seen.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
            seen.append(is_deferred())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [True, False]


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6])
def test_an_interrupt_while_handlers_are_restored(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And while they are replaced: before and after each call of `signal.signal`."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    handlers = [signal.getsignal(s) for s in SIGNALS]
    setter, calls = signal.signal, []

    def interrupting(signum: int, handler: object) -> object:
        calls.append(signum)
        if 2 * len(calls) - 1 == at:
            interrupt()
        found = setter(signum, handler)  # type: ignore[arg-type]
        if 2 * len(calls) == at:
            interrupt()
        return found

    monkeypatch.setattr(signal, "signal", interrupting)
    try:
        with pytest.raises(KeyboardInterrupt), deferred():
            pass
        monkeypatch.undo()
        assert [signal.getsignal(s) for s in SIGNALS] == handlers
        assert not is_deferred()
        with deferred():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    finally:
        monkeypatch.undo()
        signal.signal(signal.SIGALRM, before)
