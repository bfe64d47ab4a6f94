"""Threads that compile take turns, and what one of them replaces is as before in the others."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest

from autopipe.passes.one_at_a_time import RARELY, one_at_a_time, replaced


def elsewhere(function: Callable[[], Any]) -> Any:
    """What a function returns in another thread."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(10)
    return found[0]


class Base:
    def method(self, x: int) -> int:
        return x

    @classmethod
    def built(cls, x: int) -> tuple[str, int]:
        return cls.__name__, x

    @staticmethod
    def plain(x: int) -> int:
        return x


class Child(Base):
    pass


@pytest.mark.parametrize("owner", [Base, Child])
def test_a_method(owner: type[Base]) -> None:
    names = dict(vars(owner))
    with replaced(owner, "method", lambda self, x: -x):
        assert owner().method(3) == -3
        assert elsewhere(lambda: owner().method(3)) == 3
    assert owner().method(3) == 3
    assert dict(vars(owner)) == names


@pytest.mark.parametrize("owner", [Base, Child])
def test_a_class_method(owner: type[Base]) -> None:
    names = dict(vars(owner))
    with replaced(owner, "built", lambda cls, x: (cls, -x)):
        assert Child.built(3) == (Child, -3)
        assert elsewhere(lambda: Child.built(3)) == ("Child", 3)
    assert Child.built(3) == ("Child", 3)
    assert dict(vars(owner)) == names


def test_a_class_method_of_c() -> None:
    class Words(dict[str, int]):
        pass

    with replaced(Words, "fromkeys", lambda cls, keys: (cls, keys)):
        assert Words.fromkeys("ab") == (Words, "ab")
        assert elsewhere(lambda: Words.fromkeys("ab")) == {"a": None, "b": None}
    assert "fromkeys" not in vars(Words)
    assert Words.fromkeys("ab") == {"a": None, "b": None}


def test_a_function_of_a_module() -> None:
    module = types.ModuleType("m")
    module.f = abs  # type: ignore[attr-defined]
    with replaced(module, "f", lambda x: 7):
        assert module.f(-1) == 7
        assert elsewhere(lambda: module.f(-1)) == 1
    assert module.f is abs


def test_a_builtin_that_a_module_uses() -> None:
    """``print`` is not in the module; afterwards it is not there either."""
    scope = types.ModuleType("m")
    exec("def say(x): return print(x)", vars(scope))
    with replaced(scope, "print", lambda x: f"kept {x}"):
        assert scope.say(1) == "kept 1"
    assert "print" not in vars(scope)


def test_a_wrapper_that_is_kept_is_the_original() -> None:
    with replaced(random, "random", lambda: 2.0):
        kept = random.random
        assert kept() == 2.0
    assert 0 <= kept() < 1
    assert random.random is not kept


def test_a_replacement_by_others_stays() -> None:
    module = types.ModuleType("m")
    module.f = abs  # type: ignore[attr-defined]
    with replaced(module, "f", lambda x: 7):
        module.f = round  # type: ignore[attr-defined]
    assert module.f is round


def test_an_error_restores_too() -> None:
    with pytest.raises(KeyError), replaced(random, "random", lambda: 2.0):
        raise KeyError
    assert random.random() != 2.0


def test_one_thread_at_a_time() -> None:
    inside: list[str] = []
    entered = threading.Event()
    leave = threading.Event()

    def first() -> None:
        with one_at_a_time():
            entered.set()
            assert leave.wait(10)
            inside.append("first")

    def second() -> None:
        with one_at_a_time(), one_at_a_time():  # a thread may enter twice
            inside.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    assert inside == []
    leave.set()
    for thread in threads:
        thread.join(10)
    assert inside == ["first", "second"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_does_not_wait_for_a_thread_that_it_lacks() -> None:
    started, end = threading.Event(), threading.Event()

    def compiling() -> None:
        with one_at_a_time():
            started.set()
            end.wait(60)

    thread = threading.Thread(target=compiling)
    thread.start()
    started.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # which ends a child that waits
        with one_at_a_time():
            os._exit(7)
    _, status = os.waitpid(child, 0)
    end.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 7


def test_a_thread_that_forks_within_its_turn() -> None:
    with one_at_a_time():
        child = os.fork()
        if child == 0:
            signal.alarm(20)
    if child == 0:
        os._exit(8)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 8


def test_garbage_is_collected_rarely_while_a_thread_compiles() -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(700, 10, 10)
        with one_at_a_time():
            assert gc.get_threshold() == RARELY
            with one_at_a_time():
                assert gc.get_threshold() == RARELY
            assert gc.get_threshold() == RARELY
        assert gc.get_threshold() == (700, 10, 10)
    finally:
        gc.set_threshold(*before)


@pytest.mark.parametrize("own", [(0, 10, 10), (10**6, 10, 10)])
def test_thresholds_of_the_user_are_left_alone(own: tuple[int, int, int]) -> None:
    """Who collects seldom or never has a reason; so has who changes it meanwhile."""
    before = gc.get_threshold()
    try:
        gc.set_threshold(*own)
        with one_at_a_time():
            assert gc.get_threshold() == own
        gc.set_threshold(700, 10, 10)
        with one_at_a_time():
            gc.set_threshold(*own)
        assert gc.get_threshold() == own
    finally:
        gc.set_threshold(*before)
