"""The dimensions that are symbolic in a captured graph, and their names."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.errors import UnsupportedError
from autopipe.passes.capture import CaptureRequest, capture
from autopipe.passes.ir import B, Captured


class Shifted(nn.Module):
    """Its second input is one shorter than the first."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return (x[:, 1:] + y).sum(1), x.shape[1]


class Apart(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.mean(1) + y.mean(1) * y.shape[1]


class Fixes(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return sum(x.unbind(1)) + y.mean(1)


class Square(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + x.t()).mean(1) + y.mean(1)


def captured(model: nn.Module, x: Tensor, y: Tensor, *lengths: dict[int, str | None]) -> Captured:
    leaves, spec = pytree.tree_flatten(((x, y), {}))
    return capture(CaptureRequest(model, leaves, spec, (0, 0), lengths))


def test_lengths_have_the_names_of_their_arguments() -> None:
    found = captured(Apart(), torch.randn(4, 5), torch.randn(4, 7), {1: None}, {1: None})
    assert [(str(x.name), x.example, x.places) for x in found.lengths] == [
        ("x_dim1", 5, ((0, 1),)),
        ("y_dim1", 7, ((1, 1),)),
    ]
    assert found.sizes([torch.empty(2, 9), torch.empty(2, 3)], 2) == {
        B: 2,
        sympy.Symbol("x_dim1"): 9,
        sympy.Symbol("y_dim1"): 3,
    }


def test_dimensions_with_one_name_are_one_length() -> None:
    found = captured(Apart(), torch.randn(4, 5), torch.randn(4, 5), {1: "time"}, {1: "time"})
    assert [(str(x.name), x.places) for x in found.lengths] == [("time", ((0, 1), (1, 1)))]
    assert found.sizes([torch.empty(2, 9), torch.empty(2, 3)], 2) is None


def test_a_size_that_is_computed_from_another() -> None:
    found = captured(Shifted(), torch.randn(4, 5), torch.randn(4, 4), {1: None}, {1: None})
    sizes = found.sizes([torch.empty(2, 9), torch.empty(2, 8)], 2)
    assert sizes is not None
    assert set(sizes.values()) == {2, 9} or set(sizes.values()) == {2, 8}
    assert found.sizes([torch.empty(2, 9), torch.empty(2, 9)], 2) is None
    (_, number) = found.leaves
    assert number.value(sizes) == 9


def test_a_dimension_that_the_model_fixes_is_no_length() -> None:
    found = captured(Fixes(), torch.randn(4, 5), torch.randn(4, 5), {1: None}, {1: None})
    assert [x.places for x in found.lengths] == [((1, 1),)]


def test_a_length_that_must_be_the_batch_size() -> None:
    with pytest.raises(UnsupportedError, match="equal to the batch size"):
        captured(Square(), torch.randn(4, 4), torch.randn(4, 5), {1: None}, {})


def test_names_of_lengths_are_no_names_of_ops() -> None:
    found = captured(Apart(), torch.randn(4, 5), torch.randn(4, 7), {1: "mean"}, {1: "add"})
    names = {n.name for n in found.graph_module.graph.nodes}
    assert not names & {"mean", "add"}
