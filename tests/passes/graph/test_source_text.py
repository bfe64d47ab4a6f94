"""Constants, operators and names as Python source: what is written evaluates to what was given."""

from __future__ import annotations

import ast
import keyword
import math
import random
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum, IntEnum
from math import inf, nan
from typing import Any, NamedTuple

import numpy
import pytest
import torch

from autopipe.passes.graph import Names, is_identifier, literal, operator_path, quoted
from tests.support import hostile

SCOPE = {"torch": torch, "device": torch.device, "inf": inf, "nan": nan}


class Color(str, Enum):
    RED = "red\n"


class Level(IntEnum):
    HIGH = 3


class Pair(NamedTuple):
    first: int
    second: float


def same(a: Any, b: Any) -> bool:
    """Equal to the bit: signs of zeros and NaNs, types of entries."""
    if isinstance(b, (list, tuple)):
        kind = list if isinstance(b, list) else tuple
        return type(a) is kind and len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, dict):
        return type(a) is dict and list(a) == list(b) and all(map(same, a.values(), b.values()))
    if isinstance(b, complex):
        return type(a) is complex and same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(b, float):
        return type(a) is float and struct.pack("d", a) == struct.pack("d", b)
    if isinstance(b, (int, str)) and not isinstance(b, bool):
        return type(a) in (int, str) and a == b
    return type(a) is type(b) and bool(a == b)


def written(value: Any) -> str:
    """The literal, after it was evaluated and compared."""
    text = literal(value)
    assert same(eval(text, dict(SCOPE)), value), text
    return text


VALUES = [
    *(None, True, False, Ellipsis, 0, -1, 2**63, -(2**64), 10**5000, Level.HIGH),
    *(0.0, -0.0, 1e-320, 1e308, inf, -inf, nan, -nan, 0.1, numpy.float64(0.1)),
    *(0j, -0j, complex(-0.0, 0.0), complex(0.0, -0.0), complex(inf, nan), complex(-nan, -inf)),
    *(1 + 2j, complex(-0.0, -0.0), numpy.complex128(1 - 0j)),
    *("", "a'b\"c", "\\", "\n\r\x0c\x85\u2028", "\ud800", "😀", "# COUNTER: 3", "{x}", "%s"),
    Color.RED,
    *(b"", b"\x00'\"\n\xff"),
    *(torch.float32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.strided),
    *(torch.sparse_coo, torch.channels_last, torch.preserve_format, torch.per_tensor_affine),
    *(torch.device("cpu"), torch.device("cuda", 3), torch.device("meta")),
    *([], (), [1, [2.5, [None]]], (1,), ((), [()]), [True, 1, 1.0], torch.Size([2, 3])),
    *({}, {"from": 1, "a b": [-0.0]}, Pair(1, -0.0)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_a_literal_is_the_value(value: Any) -> None:
    text = written(value)
    assert text.isascii()
    assert text.isprintable()


@pytest.mark.parametrize("parts", [(None, 3, None), (0, 2**70, -1), (1, None, 2)])
def test_slices(parts: tuple[Any, ...]) -> None:
    assert eval(literal(slice(*parts))) == slice(*parts)


@pytest.mark.parametrize("value", [object(), torch.zeros(1), {1, 2}, range(3), len, torch.add])
def test_what_has_no_literal_is_refused(value: Any) -> None:
    for whole in (value, [value], {"a": (value,)}, slice(value)):
        with pytest.raises(TypeError, match="a value of type"):
            literal(whole)


def test_values_that_the_caller_writes_are_found_anywhere() -> None:
    def own(value: Any) -> str | None:
        return "x_1" if value == "node" else None

    assert literal(["node", {"a": ("node",)}, slice("node", 2)], own) == (
        '[x_1, {"a": (x_1,)}, slice(x_1, 2, None)]'
    )


# ------------------------------------------------------------------------------- operators


@pytest.fixture(scope="module")
def library() -> Iterator[torch.library.Library]:
    made = torch.library.Library("autopipe_test_text", "FRAGMENT")
    for name in ("plain", "lambda", "plain.from", "plain.overloads"):
        made.define(f"{name}(Tensor x{', int n' if '.' in name else ''}) -> Tensor")
    yield made
    with suppress(UnicodeDecodeError):  # torch 2.11 reads some names back wrongly
        made._destroy()


@pytest.mark.parametrize(
    ("name", "which", "expected"),
    [
        ("plain", "", "torch.ops.autopipe_test_text.plain.default"),
        ("lambda", "", 'getattr(torch.ops.autopipe_test_text, "lambda").default'),
        ("plain", "from", 'getattr(torch.ops.autopipe_test_text.plain, "from")'),
    ],
)
def test_an_operator_is_found_under_its_path(
    library: Any, name: str, which: str, expected: str
) -> None:
    packet = getattr(torch.ops.autopipe_test_text, name)
    op = getattr(packet, which or "default")
    assert operator_path(op) == expected == literal(op)
    assert eval(expected, dict(SCOPE)) is op


def test_an_operator_that_an_attribute_hides_is_refused(library: Any) -> None:
    """``torch.ops.autopipe_test_text.plain.overloads`` is a method."""
    packet = torch.ops.autopipe_test_text.plain
    op = type(packet).__getattr__(packet, "overloads")
    delattr(packet, "overloads")  # where torch has stored it
    with pytest.raises(TypeError, match="does not return under its name"):
        operator_path(op)


def test_every_operator_of_torch_has_a_path() -> None:
    found = 0
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for which in packet.overloads() if hasattr(packet, "overloads") else ():
            op = getattr(packet, which)
            assert eval(operator_path(op), dict(SCOPE)) is op
            found += 1
    assert found > 100


@pytest.mark.parametrize("function", [len, torch.add, torch.tensor, 3, torch.ops.aten.add])
def test_functions_that_are_no_operators_are_refused(function: Any) -> None:
    with pytest.raises(TypeError, match="no operator of torch"):
        operator_path(function)


# ------------------------------------------------------------------------------- names


def test_free_identifiers_stay() -> None:
    names = Names({"ctx"})
    for wanted in ("x", "x_1", "add_15", "p_a_weight", "_log_softmax", "x_01"):
        assert names.create(wanted) == wanted


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("lambda", "lambda_1"),
        ("print", "print_1"),
        ("ctx", "ctx_1"),
        ("", "_"),
        ("3d", "_3d"),
        ("a.b-c", "a_b_c"),
        ("a\n", "a_"),
        ("ﬁ", "_"),
        ("x_٣", "x__"),
        ("__debug__", "__debug___1"),
        ("x_" + "9" * 5000, "x_" + "9" * 5000),
    ],
)
def test_other_names_become_identifiers(wanted: str, expected: str) -> None:
    assert Names({"ctx"}).create(wanted) == expected


def test_names_are_given_once() -> None:
    rng = random.Random(0)
    names = Names({"ctx", "args"})
    wanted = [rng.choice([hostile.text(rng), rng.choice(hostile.WORDS)]) for _ in range(3000)]
    made = [names.create(w) for w in wanted]
    assert len(set(made)) == len(made)
    assert all(re.fullmatch("[A-Za-z_][A-Za-z_0-9]*", name) for name in made)
    assert all(is_identifier(name) and not keyword.iskeyword(name) for name in made)
    assert not {"ctx", "args"} & set(made)


@pytest.mark.parametrize("text", ["a\n", "", "1a", "é", "ﬁ", "lambda", "a b", None, 3, "x_٣"])
def test_what_is_no_identifier(text: Any) -> None:
    assert not is_identifier(text)


def test_any_text_as_a_literal() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        value = hostile.text(rng)
        found = quoted(value)
        assert found.isascii()
        assert found.isprintable()
        assert ast.literal_eval(found) == value


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.full)])
def test_any_constant_as_a_literal(count: int) -> None:
    rng = random.Random(2)
    with hostile.nothing_runs():
        for _ in range(count):
            written(constant(rng))


def constant(rng: random.Random, depth: int = 0) -> Any:
    """Any constant: nested, of any type that has a literal."""
    kind = rng.randrange(10 if depth < 3 else 7)
    if kind < 2:
        return rng.choice(VALUES)
    if kind == 2:
        return rng.randrange(-(2 ** rng.randrange(1, 200)), 2**70)
    if kind == 3:
        (value,) = struct.unpack("d", rng.randbytes(8))
        return math.copysign(nan, value) if math.isnan(value) else value
    if kind == 4:
        return complex(*(rng.choice([0.0, -0.0, inf, -inf, 1.5, -2.0]) for _ in range(2)))
    if kind < 7:
        return hostile.text(rng)
    inside = [constant(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 9:
        return {hostile.text(rng): v for v in inside}
    return inside if kind == 7 else tuple(inside)
