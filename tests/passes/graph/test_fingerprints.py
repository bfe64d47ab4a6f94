"""Fingerprints of graphs written by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx

from autopipe.passes.graph.fingerprints import fingerprint

aten = torch.ops.aten


def made(name: str, *args: Any, static: bool = False) -> str:
    """The fingerprint of an input, and of an op of it with more arguments."""
    graph = fx.Graph()
    node = graph.call_function(aten.mul.Tensor, (graph.placeholder(name), *args))
    node.meta |= {"static": True} if static else {}
    graph.output(node)
    return fingerprint(graph)


def test_fingerprints_ignore_names_only() -> None:
    assert made("a", 2) == made("b", 2)
    assert len({made("a", 2), made("a", 3), made("a", 2, static=True)}) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (math.nan, -math.nan),
        (0.0, -0.0),
        (complex(0, math.nan), complex(0, -math.nan)),
        (1, True),
        (1, 1.0),
        ([1], (1,)),
        (torch.float32, "torch.float32"),
    ],
)
def test_constants_that_differ_in_anything(one: Any, other: Any) -> None:
    assert made("x", one) != made("x", other)
    assert made("x", one) == made("x", one)


def test_a_text_is_no_node() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.mul.Tensor, (x, x)))
    assert made("x", "%0") != fingerprint(graph)


def test_a_constant_that_no_program_can_hold() -> None:
    value = object()
    assert made("x", value) == made("y", value)
    assert made("x", value) != made("x", object())
