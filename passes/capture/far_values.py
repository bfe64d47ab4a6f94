"""What an attribute that a forward counts on may be after many calls.

A counter that only decides after a thousand calls gives the same graph in the first two. So a third
trace runs with values that answer every comparison the other way round, and with long lists.
"""

from __future__ import annotations

import operator
import sys
from typing import TYPE_CHECKING, Any

from autopipe.errors import CaptureError
from autopipe.passes.graph import is_user_file
from autopipe.passes.python_state import Change

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LONG = 1000
"""How many entries a list has that grew in every call."""

MOST_ANSWERS = 1000
"""How many comparisons are answered the other way round; then it is a loop that does not end."""


def far(changes: Sequence[Change], again: Sequence[Change]) -> list[Change]:
    """Return changes to what their values may be after many calls.

    Args:
        changes: of a first call.
        again: of a second call.

    Returns:
        Those of numbers and lists that both calls change.
    """
    both = {(id(c.holder.owner), c.key) for c in again}
    found = []
    for change in changes:
        if (id(change.holder.owner), change.key) in both:
            value = _far_value(change.after)
            if value is not None:
                found.append(change._replace(after=value))
    return found


def _far_value(value: Any) -> Any:
    if type(value) is int:
        return OtherInt(value)
    if type(value) is float:
        return OtherFloat(value)
    if type(value) is tuple and value:  # the content of a list
        return value + value[-1:] * LONG
    return None


def _other(answer: Callable[..., Any]) -> Callable[..., Any]:
    """A comparison that gives the user's code the other answer."""

    def compare(self: Any, *others: Any) -> Any:
        found = answer(*(_plain(x) for x in (self, *others)))
        if not is_user_file(sys._getframe(1).f_code.co_filename):
            return found
        self.answers[0] += 1
        if self.answers[0] > MOST_ANSWERS:
            raise CaptureError("the forward compares a number that it counts without end")
        return not found

    return compare


def _plain(value: Any) -> Any:
    if isinstance(value, OtherInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, OtherFloat) else value


def _computed(operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation whose result is compared the other way round, too."""

    def compute(self: Any, *others: Any) -> Any:
        found = operation(*(_plain(x) for x in (self, *others)))
        made: Any = {int: OtherInt, float: OtherFloat}.get(type(found), lambda x: x)(found)
        if made is not found:
            made.answers = self.answers
        return made

    return compute


def _reflected(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda b, a: operation(a, b)


METHODS = {
    **{f"__{n}__": _other(getattr(operator, n)) for n in ("eq", "ne", "lt", "le", "gt", "ge")},
    "__bool__": _other(bool),
    **{
        name: _computed(function)
        for n in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow")
        for name, function in (
            (f"__{n}__", getattr(operator, n)),
            (f"__r{n}__", _reflected(getattr(operator, n))),
        )
    },
    **{f"__{n}__": _computed(getattr(operator, n)) for n in ("neg", "abs")},
}


class OtherInt(int):
    """A whole number that answers the user's comparisons the other way round."""

    __hash__ = int.__hash__

    def __init__(self, value: int) -> None:
        self.answers = [0]


class OtherFloat(float):
    """A number that answers the user's comparisons the other way round."""

    __hash__ = float.__hash__

    def __init__(self, value: float) -> None:
        self.answers = [0]


for _kind in (OtherInt, OtherFloat):
    for _name, _method in METHODS.items():
        setattr(_kind, _name, _method)
