"""Write values of a graph as Python source: literals, paths of operators, checked identifiers.

A program must hold nothing of a model but what these functions return. A name is an identifier that
`Names` has made; anything else is a literal that evaluates to an equal value of the same type.
"""

from __future__ import annotations

import builtins
import functools
import keyword
import math
import re
from typing import TYPE_CHECKING, Any

import torch

from autopipe.passes._torch import HigherOrderOperator, OpOverload

if TYPE_CHECKING:
    from collections.abc import Callable, Container

IDENTIFIER = re.compile(r"[a-zA-Z_][0-9a-zA-Z_]*")
"""Python accepts more letters, but takes some of them for others: `ﬁ` is the identifier `fi`."""

NUMBERED = re.compile(r"(.+?)(?:_(\d{1,9}))?")
"""Groups: a name without the number at its end, and the number."""

FORBIDDEN = frozenset({*keyword.kwlist, *vars(builtins)})
"""Names that no value has: words of Python, and builtins, which literals use."""

CONSTANTS = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)
"""Types whose values are attributes of `torch`."""

DECIMAL_BITS = 64
"""Longer integers are written in base 16: Python limits the digits of those in base 10."""


class Names:
    """Creates identifiers, each once.

    Args:
        reserved: names that are used for other things.
    """

    def __init__(self, reserved: Container[str]) -> None:
        self._reserved = reserved
        self._used: set[str] = set()
        self._last: dict[str, int] = {}

    def create(self, wanted: str) -> str:
        """Return an identifier that was not returned before.

        Args:
            wanted: any text; it is returned as it is if it is a free identifier.
        """
        text = re.sub(r"[^0-9a-zA-Z_]+", "_", wanted) or "_"
        text = f"_{text}" if text[0].isdigit() else text
        match = NUMBERED.fullmatch(text)
        base, number = match.groups() if match else (text, None)
        if number is None or not self._is_free(text):
            last = self._last.get(base, 0)
            while not self._is_free(text):
                last += 1
                text = f"{base}_{last}"
        else:
            last = int(number)
        self._last[base] = last
        self._used.add(text)
        return text

    def _is_free(self, name: str) -> bool:
        return not (name in self._used or name in FORBIDDEN or name in self._reserved)


def is_identifier(text: object) -> bool:
    """Whether a text is an ASCII identifier of Python that a value or an argument can have."""
    taken = (*keyword.kwlist, "__debug__")
    return isinstance(text, str) and bool(IDENTIFIER.fullmatch(text)) and text not in taken


def quoted(text: str) -> str:
    """Return a string literal in ASCII, on one line, in double quotes.

    Args:
        text: any string, lone surrogates included.
    """
    escaped = text.encode("unicode_escape").decode("ascii")
    return '"' + escaped.replace('"', '\\"') + '"'


def operator_path(target: Any) -> str:
    """Return an expression for an operator of torch: ``torch.ops.aten.add.Tensor``.

    A part that is no identifier is written ``getattr(torch.ops.mylib, "lambda")``.

    Args:
        target: an `OpOverload` or a `HigherOrderOperator`.

    Raises:
        TypeError: it is something else, or `torch.ops` does not return it under its name.
    """
    if isinstance(target, OpOverload):
        parts = [*target._schema.name.split("::", 1), target._overloadname]
    elif isinstance(target, HigherOrderOperator):
        parts = ["higher_order", target.__name__]
    else:
        raise TypeError(f"a function that is no operator of torch: {target}")
    found: Any = torch.ops
    for part in parts:
        found = getattr(found, part, None)
    if found is not target:
        raise TypeError(f"an operator that torch.ops does not return under its name: {target}")
    return functools.reduce(_attribute, parts, "torch.ops")


def _attribute(owner: str, name: str) -> str:
    return f"{owner}.{name}" if is_identifier(name) else f"getattr({owner}, {quoted(name)})"


def literal(value: Any, own: Callable[[Any], str | None] = lambda value: None) -> str:
    """Write a constant, or containers of constants, as an expression.

    It needs the names `torch`, `device`, `inf` and `nan`, and builtins.

    Args:
        value: what the expression evaluates to.
        own: returns the expression of a value that is written in another way; None: it is not.

    Raises:
        TypeError: there is no such expression.
    """
    given = own(value)
    if given is not None:
        return given
    if value is None or value is Ellipsis or isinstance(value, bool):
        return str(value)
    if isinstance(value, (int, float, complex)):
        return _number(value)
    if isinstance(value, str):
        return quoted(str.__str__(value))  # (`str` of a member of an enum would be its name)
    if isinstance(value, bytes):
        return repr(bytes(value))
    if isinstance(value, (list, tuple)):
        inside = [literal(v, own) for v in value]
        if isinstance(value, list):
            return f"[{', '.join(inside)}]"
        return f"({', '.join(inside)}{',' if len(inside) == 1 else ''})"
    if isinstance(value, dict):
        pairs = (f"{literal(k, own)}: {literal(v, own)}" for k, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, slice):
        return f"slice({', '.join(literal(v, own) for v in (value.start, value.stop, value.step))})"
    return _of_torch(value)


def _of_torch(value: Any) -> str:
    if isinstance(value, torch.device):
        index = "" if value.index is None else f", index={value.index}"
        return f"device(type={value.type!a}{index})"
    if isinstance(value, CONSTANTS):
        name = str(value).removeprefix("torch.")
        if is_identifier(name) and getattr(torch, name, None) is value:
            return f"torch.{name}"
    if isinstance(value, (OpOverload, HigherOrderOperator)):
        return operator_path(value)
    raise TypeError(f"a value of type {type(value).__qualname__}")


def _number(value: complex) -> str:
    if isinstance(value, int):
        value = int(value)
        return hex(value) if value.bit_length() > DECIMAL_BITS else str(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return repr(float(value))
        sign = "-" if math.copysign(1.0, value) < 0 else ""
        return sign + ("nan" if math.isnan(value) else "inf")
    value = complex(value)  # as a sum of two literals it would lose the sign of a zero
    return f"complex({_number(value.real)}, {_number(value.imag)})"
