"""What calls must have in common with captured ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from autopipe.call_signature import CallInputs, CallSignature, changed_leaves, described, flatten
from autopipe.errors import InputError

X = torch.zeros(4, 3)


def signature(*args: Any, **kwargs: Any) -> CallSignature:
    return CallSignature.of(CallInputs(*flatten(args, kwargs), (), 0))


@dataclass
class Batch:
    x: Tensor
    scale: float


def test_sizes_are_free_and_keywords_have_no_order() -> None:
    assert signature(X, a=X, b=1) == signature(torch.ones(7, 2), b=1, a=X[:1])
    assert hash(signature(a=X, b=1)) == hash(signature(b=1, a=X))


def test_dtype_dimensions_values_and_structure_count() -> None:
    different = {signature(*args) for args in ((X,), (X.double(),), (X[0],), ([X],), (X, 1), (1,))}
    assert len(different) == 6


def test_dataclasses_are_containers() -> None:
    leaves, _ = flatten((Batch(X, 2.0),), {})
    assert leaves[0] is X
    assert leaves[1:] == [2.0]


def test_static_shapes_leave_out_the_batch_dimension() -> None:
    leaves, spec = flatten((X, torch.zeros(5, 4, 6), "text", torch.zeros(2)), {})
    inputs = CallInputs(leaves, spec, (0, 1, None, None), 4)
    assert inputs.static_shapes() == ((3,), (5, 6), (2,))


def test_a_call_is_described_as_code() -> None:
    assert described(signature(X, mask=None)) == "pipe(float32 2-d, mask=None)"
    assert described(signature(X.long(), mask=X)) == "pipe(int64 2-d, mask=float32 2-d)"


def test_which_leaves_changed() -> None:
    old, new = signature(X, Batch(X, 2.0), on=True), signature(X[0], Batch(X, 3.0), on=True)
    assert changed_leaves(old, old) == []
    assert old == signature(X, Batch(X, 3.0), on=True)
    assert not old != signature(X, Batch(X, 3.0), on=True)  # noqa: SIM202
    assert changed_leaves(old, new, numbers=[2]) == [
        ("args[0]", "float32 2-d", "float32 1-d", True),
        ("args[1]", "2.0", "3.0", False),
    ]
    assert changed_leaves(old, signature(X)) is None


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    ],
)
@pytest.mark.filterwarnings("ignore:.*beta state", "ignore:.*prototype stage")
def test_tensors_that_are_not_dense(tensor: torch.Tensor) -> None:
    with pytest.raises(InputError, match="not dense"):
        flatten((tensor,), {})
