"""Messages between workers: in order, bounded, and never a reason to hang.

No test sleeps: a mailbox whose condition tells when somebody starts to wait is waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from autopipe.runtime.mailbox import AbortError, Key, Mailbox, queue_capacity

LIMIT = 10.0
"""Seconds after which something that should have happened at once counts as a hang."""


class Watched(threading.Condition):
    """Counts those who wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.release()
        return super().wait(timeout)


def watched() -> tuple[Mailbox, threading.Semaphore]:
    """A mailbox, and a semaphore that is released whenever somebody begins to wait."""
    mailbox = Mailbox()
    condition = Watched()
    mailbox._changed = condition
    return mailbox, condition.waits


def put(mailbox: Mailbox, key: Key, message: Any, capacity: int = 1) -> None:
    mailbox.reserve(key, capacity)
    mailbox.put(key, message)


class Started:
    """A call in a thread of its own."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, *args), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            self.result = function(*args)
        except BaseException as error:
            self.error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> Started:
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), "it hangs"
        return self


def test_a_message_is_taken_once_under_its_key() -> None:
    mailbox = Mailbox()
    for m in range(3):
        put(mailbox, ("x", 1, m), f"x{m}", 3)
    put(mailbox, ("y", 1, 0), "y0")
    assert mailbox.take(("x", 1, 1)) == "x1"
    assert mailbox.take(("y", 1, 0)) == "y0"
    assert [mailbox.take(("x", 1, m)) for m in (0, 2)] == ["x0", "x2"]
    assert mailbox._messages == {}


def test_taking_waits_for_the_message() -> None:
    mailbox, waits = watched()
    taker = Started(mailbox.take, ("x", 0, 0))
    assert waits.acquire(timeout=LIMIT)
    put(mailbox, ("y", 0, 0), "another kind")
    assert waits.acquire(timeout=LIMIT)  # woken, and waiting again
    assert taker.running
    put(mailbox, ("x", 0, 0), "mine")
    assert taker.end().result == "mine"


@pytest.mark.parametrize("capacity", [1, 3])
def test_a_sender_waits_where_too_much_lies(capacity: int) -> None:
    mailbox, waits = watched()
    for m in range(capacity):
        put(mailbox, ("x", 0, m), m, capacity)
    sender = Started(put, mailbox, ("x", 0, capacity), capacity, capacity)
    assert waits.acquire(timeout=LIMIT)
    assert sender.running
    assert len(mailbox._messages) == capacity
    assert mailbox.take(("x", 0, 0)) == 0
    sender.end()
    assert sender.error is None
    assert [mailbox.take(("x", 0, m)) for m in range(1, capacity + 1)] == [*range(1, capacity + 1)]


def test_nothing_is_computed_before_a_slot_is_free() -> None:
    mailbox, waits = watched()
    put(mailbox, ("x", 0, 0), 0)
    made: list[int] = []

    def send() -> None:
        mailbox.reserve(("x", 0, 1), 1)
        made.append(1)
        mailbox.put(("x", 0, 1), made[0])

    sender = Started(send)
    assert waits.acquire(timeout=LIMIT)
    assert made == []
    assert mailbox.take(("x", 0, 0)) == 0
    sender.end()
    assert mailbox.take(("x", 0, 1)) == 1


def test_capacity_is_the_distance_and_one_more() -> None:
    assert [
        queue_capacity(0, 1),
        queue_capacity(3, 2),
        queue_capacity(0, 5),
        queue_capacity(5, 0),
    ] == [2, 2, 6, 6]


def test_the_bound_is_per_kind_and_stage() -> None:
    """A full kind does not hold up another, nor the same kind for another stage."""
    mailbox = Mailbox()
    put(mailbox, ("x", 0, 0), "full")
    put(mailbox, ("y", 0, 0), "another kind")
    put(mailbox, ("x", 1, 0), "another stage")
    assert mailbox.take(("x", 1, 0)) == "another stage"


@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_many_messages_through_a_small_box(capacity: int) -> None:
    mailbox = Mailbox()
    count = 200

    def produce() -> None:
        for m in range(count):
            put(mailbox, ("x", 1, m), m, capacity)

    def pass_on() -> None:
        for m in range(count):
            put(mailbox, ("x", 2, m), mailbox.take(("x", 1, m)) * 2, capacity)

    def consume() -> list[int]:
        return [mailbox.take(("x", 2, m)) for m in range(count)]

    started = [Started(f) for f in (produce, pass_on, consume)]
    assert [s.end().error for s in started] == [None] * 3
    assert started[-1].result == [2 * m for m in range(count)]


def test_aborting_wakes_everybody() -> None:
    mailbox, waits = watched()
    put(mailbox, ("full", 0, 0), None)
    waiting = [Started(mailbox.take, ("x", k, 0)) for k in range(3)]
    waiting += [Started(put, mailbox, ("full", 0, m), None) for m in (1, 2)]
    for _ in waiting:
        assert waits.acquire(timeout=LIMIT)
    assert all(w.running for w in waiting)
    mailbox.abort()
    assert [type(w.end().error) for w in waiting] == [AbortError] * len(waiting)


def test_after_an_abort_nothing_is_kept_and_nothing_waits() -> None:
    mailbox = Mailbox()
    put(mailbox, ("x", 0, 0), "dropped")
    mailbox.abort()
    assert mailbox._messages == {}
    with pytest.raises(AbortError):
        mailbox.take(("x", 0, 0))
    for m in range(3):
        with pytest.raises(AbortError):
            put(mailbox, ("x", 0, m), None)
    mailbox.abort()  # twice does no harm
    assert mailbox._messages == {}
