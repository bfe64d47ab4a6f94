"""A thread that is kept takes over its caller's settings for each task, as a new one would."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import torch

from autopipe.runtime.thread_settings import SMALLEST, ThreadSettings
from autopipe.runtime.worker_threads import KeptThread
from autopipe.runtime.workers import run_workers

CPU = torch.device("cpu")
VARIABLE: ContextVar[str] = ContextVar("VARIABLE", default="nothing")


@pytest.fixture
def kept() -> Iterator[list[KeptThread]]:
    made = [KeptThread(), KeptThread()]
    yield made
    for one in made:
        one.end()


def seen_by_workers(
    kept: list[KeptThread], look: Callable[[], Any], cores: list[set[int]] | None = None
) -> list[Any]:
    """What both workers see, and that they are the same threads each time."""
    seen: dict[int, Any] = {}

    def task(index: int) -> None:
        seen[index] = (threading.current_thread(), look())

    run_workers([lambda: task(0), lambda: task(1)], lambda: None, cores, kept)
    again: dict[int, threading.Thread] = {}

    def same(index: int) -> None:
        again[index] = threading.current_thread()

    run_workers([lambda: same(0), lambda: same(1)], lambda: None, cores, kept)
    assert again == {i: thread for i, (thread, _) in seen.items()}
    return [value for _, (_, value) in sorted(seen.items())]


def test_threads_per_operator_are_the_callers(kept: list[KeptThread]) -> None:
    """Sums are split by that number: it is part of the numbers."""
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 1, 3):
            torch.set_num_threads(count)
            assert seen_by_workers(kept, torch.get_num_threads) == [count] * 2
    finally:
        torch.set_num_threads(before)
    seen_by_workers(kept, lambda: torch.set_num_threads(before + 1))  # an operator of the user's
    assert seen_by_workers(kept, torch.get_num_threads) == [before] * 2


def test_denormals_are_flushed_as_in_the_caller(kept: list[KeptThread]) -> None:
    def flushes() -> bool:
        return bool((torch.full((8,), SMALLEST, dtype=torch.double) / 2 == 0).all())

    if not torch.set_flush_denormal(True):
        pytest.skip("the processor cannot")
    try:
        assert flushes()
        assert seen_by_workers(kept, flushes) == [True, True]
    finally:
        torch.set_flush_denormal(False)
    assert seen_by_workers(kept, flushes) == [False, False]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot pin")
def test_cores_are_those_of_the_step(kept: list[KeptThread]) -> None:
    """Pinned, pinned otherwise, left to the system, and the caller's if that is pinned."""
    own = os.sched_getaffinity(0)
    first, last = min(own), max(own)

    def look() -> set[int]:
        return os.sched_getaffinity(0)

    assert seen_by_workers(kept, look, [{first}, {last}]) == [{first}, {last}]
    assert seen_by_workers(kept, look, [{last}, {first}]) == [{last}, {first}]
    assert seen_by_workers(kept, look) == [own, own]
    try:
        os.sched_setaffinity(0, {last})
        assert seen_by_workers(kept, look) == [{last}, {last}]
    finally:
        os.sched_setaffinity(0, own)
    assert seen_by_workers(kept, look) == [own, own]


def test_nothing_is_set_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ThreadSettings.of_caller()
    calls: list[Any] = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setattr(torch, "set_flush_denormal", calls.append)
    if settings.cores is not None:
        monkeypatch.setattr(os, "sched_setaffinity", lambda *args: calls.append(args))
    settings.apply()
    assert calls == []


def test_where_the_system_cannot_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    settings = ThreadSettings.of_caller()
    assert settings.cores is None
    settings.apply()


def test_a_task_has_context_variables_for_itself(kept: list[KeptThread]) -> None:
    """numpy's error state and decimal's precision are such variables."""
    seen_by_workers(kept, lambda: VARIABLE.set("a task's"))
    assert seen_by_workers(kept, VARIABLE.get) == ["nothing", "nothing"]


def test_modes_of_a_task_end_with_it(kept: list[KeptThread]) -> None:
    def look() -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    def leave() -> None:
        torch.set_grad_enabled(True)
        torch.set_autocast_enabled("cpu", True)

    seen_by_workers(kept, leave)
    assert seen_by_workers(kept, look) == [(False, False)] * 2


@pytest.mark.parametrize("kind", ["trace", "profile"])
def test_tracers_of_new_threads_see_tasks(kept: list[KeptThread], kind: str) -> None:
    """A debugger or profiler that starts, or ends, while the threads exist."""
    found: set[tuple[int, str]] = set()

    def hook(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_name == "traced_task":
            found.add((threading.get_ident(), event))

    def traced_task() -> None:
        return None

    setters: dict[str, Callable[[Any], None]] = {
        "trace": threading.settrace,
        "profile": threading.setprofile,
    }
    seen_by_workers(kept, traced_task)
    assert found == set()
    setters[kind](hook)
    try:
        seen_by_workers(kept, traced_task)
    finally:
        setters[kind](None)
    assert len({ident for ident, _ in found}) == 2
    found.clear()
    assert (
        seen_by_workers(kept, lambda: traced_task() or (sys.gettrace(), sys.getprofile()))
        == [(None, None)] * 2
    )
    assert found == set()
