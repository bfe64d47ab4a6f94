"""A pipeline against the model itself: eager torch on the whole batch, in double precision."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autopipe
from autopipe.passes.capture import take_apart

ROUNDING = 1e-12
"""Of the largest entry of what is compared: some thousand times the rounding of one operation."""


def assert_close(found: Any, expected: Any, what: str = "") -> None:
    """Equal but for rounding; NaN and infinities where they are expected."""
    if expected is None or found is None:
        assert found is expected, what
        return
    assert found.dtype == expected.dtype, what
    assert found.shape == expected.shape, what
    if expected.is_complex():
        found, expected = (torch.view_as_real(x.resolve_conj()) for x in (found, expected))
    if not expected.is_floating_point():
        assert torch.equal(found, expected), what
        return
    finite = expected[expected.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    torch.testing.assert_close(
        found, expected, rtol=0, atol=ROUNDING * scale, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def objective(result: Any) -> Tensor:
    """One number that weighs every differentiable entry of a result differently."""
    terms = [
        (x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)).sum()
        for x in pytree.tree_leaves(take_apart(result))
        if isinstance(x, Tensor) and x.requires_grad
    ]
    return torch.stack(terms).sum()


def fresh(value: Any) -> Any:
    """The same arguments as new tensors without gradients; one object stays one object."""
    made: dict[int, Tensor] = {}

    def new(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
        return made[id(leaf)]

    return pytree.tree_map(new, take_apart(value))


def assert_agrees(pipe: autopipe.Pipeline, *args: Any, **kwargs: Any) -> Any:
    """One training step of the pipeline and of its model agree: results, gradients, buffers.

    Returns:
        The pipeline's result.
    """
    model = copy.deepcopy(pipe.model)
    pipe.model.zero_grad()
    model.zero_grad()
    torch.manual_seed(0)
    ours = fresh((args, kwargs))
    found = pipe(*ours[0], **ours[1])
    torch.manual_seed(0)
    theirs = fresh((args, kwargs))
    expected = model(*theirs[0], **theirs[1])
    assert type(found) is type(expected)
    a, structure = pytree.tree_flatten(take_apart(found))
    b, expected_structure = pytree.tree_flatten(take_apart(expected))
    assert structure == expected_structure
    for n, (x, y) in enumerate(zip(a, b, strict=True)):
        if isinstance(y, Tensor):
            assert x.requires_grad == y.requires_grad, f"result {n}"
            assert_close(x, y, f"result {n}")
        else:
            assert x == y, f"result {n}"
    objective(found).backward()
    objective(expected).backward()
    for (name, p), q in zip(pipe.model.named_parameters(), model.parameters(), strict=True):
        assert_close(p.grad, q.grad, f"gradient of {name}")
    leaves = zip(*(pytree.tree_leaves(take_apart(x)) for x in (ours, theirs)), strict=True)
    for n, (x, y) in enumerate(leaves):
        if isinstance(y, Tensor):
            assert_close(x.grad, y.grad, f"gradient of input {n}")
    for (name, x), y in zip(pipe.model.named_buffers(), model.buffers(), strict=True):
        assert_close(x, y, f"buffer {name}")
    return found


def pipelined(model: nn.Module, **options: Any) -> autopipe.Pipeline:
    """Two stages, three micro-batches, unless `options` says otherwise."""
    return autopipe.compile(model, **{"devices": 2, "chunks": 3} | options)
