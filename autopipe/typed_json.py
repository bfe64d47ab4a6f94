"""Write frozen dataclasses as JSON and read them back, refusing data of other types.

Nothing in a file is executed or imported: `json` parses it, and each value is checked against the
type annotation of its field.
"""

from __future__ import annotations

import dataclasses
import json
import math
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

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
    """Write a dataclass as indented JSON, its fields in their order."""
    return json.dumps(_plain_data(value), indent=1, allow_nan=False, ensure_ascii=False)


def _plain_data(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        keys = _keys(type(value))
        return {key: _plain_data(getattr(value, name)) for key, name in keys.items()}
    return [_plain_data(v) for v in value] if isinstance(value, tuple) else value


def _keys(kind: type) -> dict[str, str]:
    """JSON key → name of the field, in the order of the fields."""
    return {f.metadata.get("json", f.name): f.name for f in dataclasses.fields(kind)}


def parse(text: str) -> Any:
    """Parse JSON strictly: NaN and repeated keys are refused.

    Raises:
        MisfitError: the text is not JSON.
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
    hints, keys = get_type_hints(kind), _keys(kind)
    if not isinstance(value, dict):
        _misfit(where, f"an object with {', '.join(keys)}", value)
    for key in value.keys() - keys.keys():
        raise MisfitError(_field(where, key[:80]), f"one of {', '.join(keys)}", "another name")
    for key in keys.keys() - value.keys():
        raise MisfitError(_field(where, key), "a value", "nothing")
    return kind(**{keys[k]: convert(hints[keys[k]], v, _field(where, k)) for k, v in value.items()})


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
    """A value as text for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _misfit(where: str, expected: str, value: Any) -> NoReturn:
    raise MisfitError(where, expected, short(value))
