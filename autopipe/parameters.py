"""A model's tensors by their names, and where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def parameter(model: nn.Module, target: str) -> nn.Parameter:
    """A parameter by its qualified name.

    (Like `nn.Module.get_parameter`, which is ten times slower: every call asks for each.)

    Raises:
        UnsupportedError: another tensor stands in its place.
    """
    *path, name = target.split(".")
    try:
        for part in path:
            model = model._modules[part]  # type: ignore[assignment]
        found = model._parameters[name]
    except (KeyError, AttributeError) as error:
        raise replaced(target) from error
    if found is None:
        raise replaced(target)
    return found


def move(tensor: Tensor, device: torch.device) -> None:
    """Take a tensor of the model, and its gradient, to a device; it stays the same object."""
    tensor.data = tensor.data.to(device)
    if tensor.grad is not None:
        tensor.grad = tensor.grad.to(device)


def replaced(target: str) -> UnsupportedError:
    """The error of a parameter that is none."""
    return UnsupportedError(
        "a parameter has been replaced by a tensor, or is gone",
        node=target,
        remedy="torch.func.functional_call works with the model itself (pipe.model)",
    )
