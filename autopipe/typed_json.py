"""Write frozen dataclasses as JSON and read them back, refusing data of other types.

Nothing in a file is executed or imported: `json` parses it, and each value is checked against the
type annotation of its field. What a file may cost is limited: its size, nesting and number of
values are checked before it is parsed, the length of numbers and texts while they are read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import reprlib
from collections import Counter
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, NoReturn, Union, get_args, get_origin, get_type_hints

from autopipe.errors import printable, shortened

if TYPE_CHECKING:
    from collections.abc import Callable

LARGEST_FILE = 16 * 2**20
"""Bytes of a text. (A plan with ten thousand boundary tensors has two million.)"""

MOST_VALUES = 500_000
"""Values of a text: numbers, texts, lists and objects. (That plan has a hundred thousand.)"""

DEEPEST = 20
"""Lists and objects within one another. (Those of a plan: 6.)"""

LONGEST_TEXT = 2**16
"""Characters of one text."""

LONGEST_NUMBER = 40
"""Characters of one number."""

LARGEST_INTEGER = 2**64 - 1
"""The largest integer, and the smallest is its negative."""

PLAIN = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false"}


class MisfitError(ValueError):
    """A value does not have the type of its field.

    Attributes:
        where: path of the field, such as ``stages[2].seconds``; "" for the whole text.
        expected, found: descriptions.
    """

    def __init__(self, where: str, expected: str, found: str) -> None:
        super().__init__(f"{where or 'the text'}: expected {expected}, found {found}")
        self.where, self.expected, self.found = where, expected, found


def json_name(name: str) -> dict[str, str]:
    """Metadata for `dataclasses.field`: the field's name in JSON, if that differs.

    Args:
        name: its key in the file.
    """
    return {"json": name}


def to_json(value: Any) -> str:
    """Write a dataclass as indented JSON, its fields in their order.

    Raises:
        MisfitError: a text that a file cannot hold.
        ValueError: a number that is not finite.
    """
    return json.dumps(_plain_data(value), indent=1, allow_nan=False, ensure_ascii=False)


def _plain_data(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kind: Any = type(value)
        keys = _keys(kind)
        return {key: _plain_data(getattr(value, name)) for key, name in keys.items()}
    if isinstance(value, str) and (wrong := text_problem(value)):
        raise MisfitError("", wrong, short(value))
    return [_plain_data(v) for v in value] if isinstance(value, tuple) else value


@cache
def _keys(kind: Any) -> dict[str, str]:
    """JSON key → name of the field, in the order of the fields."""
    return {f.metadata.get("json", f.name): f.name for f in dataclasses.fields(kind)}


_hints = cache(get_type_hints)


def parse(content: bytes) -> Any:
    """Parse JSON strictly: NaN, repeated keys and what is beyond the limits are refused.

    Args:
        content: the text in UTF-8, without a byte order mark.

    Raises:
        MisfitError: it is not JSON, or beyond a limit of this file.
    """
    _check_limits(content)
    try:
        return json.loads(
            content.decode("utf-8"),
            parse_int=_number(int),
            parse_float=_number(float),
            parse_constant=_no_number,
            object_pairs_hook=_once,
        )
    except MisfitError:
        raise
    except UnicodeDecodeError as error:
        raise MisfitError("", "JSON in UTF-8", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise MisfitError("", "JSON", f"{type(error).__name__}: {error}") from error


def _check_limits(content: bytes) -> None:
    """Refuse, without parsing it, what would take much time or memory to parse."""
    if len(content) > LARGEST_FILE:
        raise MisfitError("", f"at most {LARGEST_FILE:,} bytes", "more")
    if content.count(b'"') > 4 * MOST_VALUES:  # a value has at most two texts, its key's too
        raise MisfitError("", f"at most {MOST_VALUES:,} values", "more")
    # No string, no quote of one: left is what separates values, and what opens and closes them.
    bare = content.replace(rb"\\", b"").replace(rb"\"", b"")
    bare = re.sub(rb'"[^"]*"', b"", bare)
    values = 1 + sum(bare.count(c) for c in (b",", b"[", b"{"))
    if values > MOST_VALUES:
        raise MisfitError("", f"at most {MOST_VALUES:,} values", f"{values:,}")
    depth = 0
    for bracket in re.sub(rb"[^\[\]{}]+", b"", bare):
        depth += 1 if bracket in b"[{" else -1
        if depth > DEEPEST:
            raise MisfitError("", f"JSON, nested at most {DEEPEST} deep", "more")
        if depth < 0:
            break  # no JSON: the parser says where


def convert(kind: Any, value: Any, where: str) -> Any:
    """Convert a parsed value to a type.

    Args:
        kind: str, int, float, bool, one of them or None, a tuple, or a dataclass of such fields.
        value: a result of `parse`, or a part of one.
        where: its path in the file, for messages.

    Returns:
        An instance of `kind`.

    Raises:
        MisfitError: the value does not fit; names the path.
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
    return _dataclass(kind, value, where)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    hints, keys = _hints(kind), _keys(kind)
    if not isinstance(value, dict):
        _misfit(where, f"an object with {', '.join(keys)}", value)
    for key in value:
        if key not in keys:
            name = shortened(printable(key), 80)
            raise MisfitError(_field(where, name), f"one of {', '.join(keys)}", "another name")
    for key in keys:
        if key not in value:
            raise MisfitError(_field(where, key), "a value", "nothing")
    return kind(**{keys[k]: convert(hints[keys[k]], v, _field(where, k)) for k, v in value.items()})


def _plain(kind: type, value: Any, where: str) -> Any:
    if type(value) is int and abs(value) > LARGEST_INTEGER:
        raise MisfitError(where, "an integer of at most 64 bits", f"{value.bit_length()} bits")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        _misfit(where, PLAIN[kind], value)
    if isinstance(value, str) and (wrong := text_problem(value)):
        raise MisfitError(where, wrong, short(value))
    return value


def text_problem(text: str) -> str | None:
    """What a text in a file would have to be, if it is not; None: it is.

    Args:
        text: a string of a parsed file, or one that is to be written.
    """
    if len(text) > LONGEST_TEXT:
        return f"a text of at most {LONGEST_TEXT:,} characters"
    wrong = re.search("[\0\ud800-\udfff]", text)
    return "a text without NUL and without halves of surrogate pairs" if wrong else None


def _field(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _no_number(text: str) -> NoReturn:
    raise MisfitError("", "finite numbers", text)


def _number(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    def read(text: str) -> int | float:
        if len(text) > LONGEST_NUMBER:
            found = f"one of {len(text):,}"
            raise MisfitError("", f"numbers of at most {LONGEST_NUMBER} characters", found)
        return kind(text)

    return read


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise MisfitError("", "every name once", f"{short(twice)} twice")
    return found


class _Short(reprlib.Repr):
    """`repr` of the beginning of a value, however large and deep the value is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80
        self.maxlevel = 3


def short(value: object) -> str:
    """A value as text for a message, cut to 80 characters."""
    return shortened(_Short().repr(value), 80)


def _misfit(where: str, expected: str, value: Any) -> NoReturn:
    raise MisfitError(where, expected, short(value))
