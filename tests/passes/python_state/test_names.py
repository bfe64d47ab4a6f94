"""The names that some code uses for attributes, and whether it may use others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from autopipe.passes.python_state.names import global_names, names_in, reads_unnamed

i = 1
NAMED: list[Callable[..., Any]] = [
    lambda o: o.a,
    lambda o: getattr(o, "a"),  # noqa: B009
    lambda o: getattr(o, "a", None),
    lambda o: getattr(o, "a", o.b),
    lambda o: hasattr(o, "a") and getattr(getattr(o, "b"), "c")(1, 2),  # noqa: B009
    lambda o: getattr(max(o, "b"), "a", max(1)),
    lambda o: [getattr(x, "a") for x in o],  # noqa: B009
]
UNNAMED: list[Callable[..., Any]] = [
    lambda o: getattr(o, f"a{i}"),
    lambda o: getattr(o, "a" + str(i)),
    lambda o: getattr(o, "a%d" % i),  # noqa: UP031
    lambda o: getattr(o, "b") + getattr(o, "a" + str(i)),  # noqa: B009
    lambda o: getattr(o, i),
    lambda o, name: getattr(o, name, None),
    lambda o, name, c: getattr(o, name if c else "a", 0),
    lambda o, name, c: getattr(o, "a" if c else name, 0),
    lambda o, name, c: getattr(o, name, "a" if c else "b"),
    lambda o, name, c: getattr(o if c else i, name, "a"),
    lambda o, name: getattr(o, "a" and name),
    lambda o: getattr(*o),
    lambda o: map(getattr, o),
    lambda o: vars(o),
    lambda o: o.__dict__,
]


@pytest.mark.parametrize("function", NAMED)
def test_constant_names(function: Any) -> None:
    assert not reads_unnamed(function.__code__)
    assert "o" not in names_in(function.__code__)


@pytest.mark.parametrize("function", UNNAMED)
def test_other_names(function: Any) -> None:
    assert reads_unnamed(function.__code__)


def test_names_and_texts_that_may_be_names() -> None:
    found = names_in((lambda o: o.a + getattr(o, "b", "no name")).__code__)
    assert found == {"a", "b", "getattr"}


def test_what_is_only_set_is_no_name() -> None:
    def sets(o: Any, x: Any) -> None:
        o.last = x
        o.count += 1
        o.seen = x
        o.part.end = o.seen

    assert names_in(sets.__code__) == {"count", "seen", "part"}


def test_attributes_are_no_global_variables() -> None:
    def uses(o: Any) -> Any:
        global j
        j = 2
        return o.a + i + max(o.i, o.j.b)

    assert global_names(uses.__code__) == {"i", "j", "max"}
