"""What a pipeline is called within: function transforms, hooks on what autograd saves."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipe.errors import UnsupportedError
from autopipe.passes._torch import has_saved_tensor_hooks, has_tangent, in_functorch_transform

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def refuse_transforms(leaves: Sequence[Any]) -> None:
    """A pipeline runs kernels; what wraps tensors to see each operator would see none.

    Raises:
        UnsupportedError: a call, or a gradient, within torch.func.grad, vmap, jvp and the like.
    """
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if in_functorch_transform(tensors):
        raise UnsupportedError(
            "a function transform around a pipeline (torch.func, vmap, gradients in batches)",
            remedy="transform the model itself (pipe.model), or call the pipeline outside",
        )
    if any(map(has_tangent, tensors)):
        raise UnsupportedError(
            "forward-mode differentiation through a pipeline", remedy="use backward()"
        )


@contextmanager
def plain_autograd() -> Iterator[None]:
    """For tracing: none of the caller's hooks on saved tensors, no anomaly detection.

    Both would look at fake tensors; the gradients that they are meant for come later.
    """
    with ExitStack() as stack:
        if has_saved_tensor_hooks():  # autograd checks what was changed in place only without hooks
            plain = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
            stack.enter_context(plain)
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(False, check_nan=False))
        yield
