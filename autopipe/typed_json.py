"""Frozen dataclasses as JSON text and back. What does not fit their types exactly is refused.

Nothing in a file is executed or looked up: it is parsed by `json`, and each value is compared with
the annotation of the field that it is for.
"""

from __future__ import annotations

import dataclasses
import json
import math
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

PLAIN = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false"}


class MisfitError(ValueError):
    """A value that is not what its place asks for.

    Attributes:
        where: the place, such as ``stages[2].seconds``; "" for the whole text.
        expected, found: in words.
    """

    def __init__(self, where: str, expected: str, found: str) -> None:
        super().__init__(f"{where or 'the text'}: expected {expected}, found {found}")
        self.where, self.expected, self.found = where, expected, found


def to_json(value: Any) -> str:
    """A dataclass as indented JSON, its fields in their order."""
    return json.dumps(dataclasses.asdict(value), indent=1, allow_nan=False, ensure_ascii=False)


def parse(text: str) -> Any:
    """JSON without what the standard does not know (NaN, the same key twice).

    Raises:
        MisfitError: it is no JSON.
    """
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise MisfitError("", "JSON", f"{type(error).__name__}: {error}") from error
    except ValueError as error:
        if isinstance(error, MisfitError):
            raise
        raise MisfitError("", "numbers of ordinary length", str(error)) from error


def convert(kind: Any, value: Any, where: str) -> Any:
    """A parsed value as `kind` says.

    Args:
        kind: str, int, float, bool, one of them or None, a tuple, or a dataclass of such fields.
        value: as `parse` gave it.
        where: the place that it stands at, for messages.

    Raises:
        MisfitError: naming the place.
    """
    if kind in PLAIN:
        return _plain(kind, value, where)
    if get_origin(kind) in (Union, UnionType):
        (one,) = [k for k in get_args(kind) if k is not NoneType]
        return None if value is None else convert(one, value, where)
    if get_origin(kind) is tuple:
        item, _ = get_args(kind)
        if not isinstance(value, list):
            _misfit(where, "a list", value)
        return tuple(convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    hints = get_type_hints(kind)
    if not isinstance(value, dict):
        _misfit(where, f"an object with {', '.join(hints)}", value)
    for name in value.keys() - hints.keys():
        raise MisfitError(_field(where, name[:80]), f"one of {', '.join(hints)}", "another name")
    for name in hints.keys() - value.keys():
        raise MisfitError(_field(where, name), "a value", "nothing")
    return kind(**{n: convert(hints[n], v, _field(where, n)) for n, v in value.items()})


def _plain(kind: type, value: Any, where: str) -> Any:
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            _misfit(where, PLAIN[kind], "one too large")
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        _misfit(where, PLAIN[kind], value)
    return value


def _field(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _no_number(text: str) -> NoReturn:
    raise MisfitError("", "finite numbers", text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise MisfitError("", "every name once", f"one of {', '.join(found)[:80]} twice")
    return found


def short(value: object) -> str:
    """A value in a message, which it must not flood."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _misfit(where: str, expected: str, value: Any) -> NoReturn:
    raise MisfitError(where, expected, short(value))
