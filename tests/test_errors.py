"""Every class of errors keeps its facts when it is moved to a line, copied or pickled."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from autopipe import errors
from tests.support import hostile


class LimitError(errors.AutopipeError):
    """A class with a constructor of its own, as a later one may have."""

    def __init__(self, limit: int, *, unit: str) -> None:
        super().__init__(f"more than {limit} {unit}", found="7", remedy="use fewer")
        self.limit = limit
        self.unit = unit


class DiskError(errors.AutopipeError, OSError):
    """A base that reads its arguments in `__new__`."""


CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.AutopipeError)
]


def made(kind: type[errors.AutopipeError]) -> errors.AutopipeError:
    """An error with a value for each argument of its class."""
    parameters = inspect.signature(kind).parameters.values()
    values = {p.name: f"the {p.name}" if "str" in str(p.annotation) else 7 for p in parameters}
    return kind(values.pop(next(iter(values))), **values)  # type: ignore[arg-type]


def facts(error: errors.AutopipeError) -> dict[str, Any]:
    return {k: v for k, v in vars(error).items() if k != "source"}


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),
}


def test_the_classes_are_found() -> None:
    assert errors.StageError in CLASSES
    assert errors.MemoryLimitError in CLASSES
    assert facts(made(errors.StageError))["stage"] == 7
    assert facts(made(errors.MemoryLimitError))["missing_bytes"] == 7


@pytest.mark.parametrize("kind", [*CLASSES, LimitError, DiskError])
def test_an_error_gets_a_line_of_the_model(kind: type[errors.AutopipeError]) -> None:
    error = made(kind)
    before = str(error)
    moved = error.at("model.py:12")
    assert type(moved) is kind
    assert moved.source == "model.py:12"
    assert "\n  source: model.py:12" in str(moved)
    assert facts(moved) == facts(error)
    assert str(error) == before, "the original stays as it is"
    assert moved.at(error.source).args == error.args
    assert "source:" not in str(error.at(None))


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", [*CLASSES, LimitError, DiskError])
def test_copies_have_the_facts(kind: type[errors.AutopipeError], way: str) -> None:
    error = made(kind).at("model.py:12")
    copied = COPIES[way](error)
    assert copied is not error
    assert type(copied) is kind
    assert str(copied) == str(error)
    assert copied.args == error.args
    assert vars(copied) == vars(error)
    assert "  what to do: " in str(copied)


def test_the_message_lists_what_is_known_in_one_order() -> None:
    error = errors.InputError("no", remedy="r", found="f", source="s", expected="e", node="n")
    assert str(error).splitlines() == [
        *("no", "  node: n", "  source: s", "  expected: e", "  found: f", "  what to do: r")
    ]
    assert str(errors.InputError("no")) == "no"


@pytest.mark.parametrize("text", [*hostile.LINE_ENDS[1:], *hostile.INVISIBLE], ids=ascii)
def test_no_message_controls_a_terminal(text: str) -> None:
    """The fields stay as they are."""
    error = errors.InputError(f"a{text}b", found=f"c{text}d", source=f"{text}.py:3")
    for shown in (str(error), str(error.at(f"e{text}f:1")), errors.printable(f"a{text}b")):
        assert shown.replace("\n", "").isprintable()
        assert "a" + ascii(text)[1:-1].replace("\n", "\\n") + "b" in shown.replace("\n", "\\n")
    assert (error.problem, error.source) == (f"a{text}b", f"{text}.py:3")


@pytest.mark.parametrize(
    "text", ["", "plain", "two\nlines\tand a tab", "加法 é ✓ 😀", "\\x0c", "x̂"]
)
def test_what_can_be_read_stays(text: str) -> None:
    assert errors.printable(text) == text


def test_require_raises_unless_the_condition_holds() -> None:
    errors.require(True, "fine")
    with pytest.raises(errors.VerifyError, match="a rule") as caught:
        errors.require(False, "a rule", node="n")
    assert caught.value.node == "n"
