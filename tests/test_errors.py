"""Every class of errors keeps its facts when it is moved to a line, copied or pickled.

And what others wrote, names and exceptions, is shown without harm.
"""

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
    assert errors.printable(text, lines=True) == text


def test_require_raises_unless_the_condition_holds() -> None:
    errors.require(True, "fine")
    with pytest.raises(errors.VerifyError, match="a rule") as caught:
        errors.require(False, "a rule", node="n")
    assert caught.value.node == "n"


# --------------------------------------------------------------------- what others wrote, as text

CONTROLS = [
    *map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), *map(chr, range(0x200B, 0x2010)),
    *map(chr, range(0x2028, 0x202F)), *map(chr, range(0x2066, 0x206A)),
    *("\u061c", "\ufeff", "\ud800", "\udfff", "\U000e0001"),
]  # fmt: skip


@pytest.mark.parametrize("c", CONTROLS, ids=ascii)
def test_controls_are_escaped(c: str) -> None:
    text = errors.printable(f"a{c}b")
    assert text.isprintable()
    assert text == f"a{ascii(c)[1:-1]}b"
    assert errors.printable(text) == text
    assert (errors.printable(f"a{c}b", lines=True) == f"a{c}b") == (c in "\n\t")


def test_other_text_stays_as_it_is() -> None:
    text = "größe × 3 µs 模型 שלום 🙂 \\x1b \\ 'quoted'"
    assert errors.printable(text) is text


@pytest.mark.parametrize("kind", CLASSES)
def test_no_fact_of_a_message_commands_the_terminal(kind: type[errors.AutopipeError]) -> None:
    parameters = inspect.signature(kind).parameters.values()
    values = {p.name: "\x1b[31m\x9b" if "str" in str(p.annotation) else 7 for p in parameters}
    error = kind(values.pop(next(iter(values))), **values)  # type: ignore[arg-type]
    for one in (error, error.at("\x1b]0;x\x07:12"), copy.copy(error)):
        assert all(c.isprintable() or c == "\n" for c in str(one))
        assert "\\x1b[31m\\x9b" in str(one)
    assert error.problem == "\x1b[31m\x9b", "facts are kept as they are"


class Loud(str):
    """A text whose methods raise."""

    def splitlines(self, keepends: bool = False) -> list[str]:
        raise RuntimeError("never")

    def isprintable(self) -> bool:
        raise RuntimeError("never")


class Named(type):
    """A class whose name cannot be asked for."""

    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("never")


def raising(result: Any) -> Exception:
    """An exception whose text is `result`, or raises it."""

    class HostileError(Exception):
        def __str__(self) -> str:
            if isinstance(result, BaseException):
                raise result
            return result  # type: ignore[no-any-return]

        __repr__ = __str__

    return HostileError("what it was made of")


def endless() -> Exception:
    class EndlessError(Exception):
        def __str__(self) -> str:
            return str(self)

    return EndlessError()


DESCRIBED: dict[str, tuple[Exception, str]] = {
    "plain": (ValueError("no"), "ValueError: no"),
    "a key": (KeyError("k"), "KeyError: 'k'"),
    "none": (RuntimeError(), "RuntimeError"),
    "spaces": (RuntimeError("\n  \n"), "RuntimeError"),
    "lines": (RuntimeError("\n\n  first\nsecond"), "RuntimeError: first"),
    "controls": (RuntimeError("\x1b[2J\rx"), "RuntimeError: \\x1b[2J\\rx"),
    "raises": (
        raising(ZeroDivisionError("x")),
        "HostileError: (no text: its __str__ raised ZeroDivisionError)",
    ),
    "raises itself": (
        raising(raising(ValueError())),
        "HostileError: (no text: its __str__ raised HostileError)",
    ),
    "no text": (raising(7), "HostileError: (no text: its __str__ raised TypeError)"),
    "another text": (raising(Loud("loud")), "HostileError: loud"),
    "endless": (endless(), "EndlessError: (no text: its __str__ raised RecursionError)"),
    "a strange name": (type("A\x1bB", (Exception,), {})("x"), "A\\x1bB: x"),
    "no name": (Named("Unnamed", (Exception,), {})("x"), "Unnamed: x"),
}


@pytest.mark.parametrize("case", DESCRIBED)
def test_an_exception_is_described_in_one_line(case: str) -> None:
    error, text = DESCRIBED[case]
    assert errors.describe(error) == text


def test_descriptions_are_short() -> None:
    text = errors.describe(RuntimeError("x" * 10**6))
    assert len(text) == errors.LONGEST_DESCRIPTION
    assert text.endswith("x…")
    whole = errors.text_of(RuntimeError("a\nb\x1b" * 1000))
    assert whole == "a\nb\\x1b" * 1000, "the whole text, where it is searched"


class Failing:
    def __repr__(self) -> str:
        raise ValueError("no text")


def test_values_of_users_are_shown() -> None:
    assert errors.shown("a\x1b") == "'a\\x1b'"
    assert errors.shown(Failing()) == "<Failing>"
    assert len(errors.shown("x" * 5000)) == 500
