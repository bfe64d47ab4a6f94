"""Make a pipeline look like its model: parameters, state dict, modes, moves, attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autopipe.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self


OWN = {"options", "memory", "training"}
"""Public attributes of a pipeline."""


class ModuleProxy(nn.Module):
    """A module that shares another one's parameters, buffers, submodules and attributes.

    Args:
        model: the other module.
        devices: where its parameters may be.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, devices: Sequence[torch.device]) -> None:
        super().__init__()
        # A child module would add a prefix to every name; instead the registries are shared.
        object.__setattr__(self, "model", model)
        self._devices = tuple(devices)
        self._share()
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = model.training

    def _share(self) -> None:
        self._parameters = self.model._parameters
        self._buffers = self.model._buffers
        self._modules = self.model._modules

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's own state dict, with the same keys."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model itself."""
        return self.model.load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Switch the model (and so the pipeline) between training and evaluation."""
        super().train(mode)
        self.model.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not set yet: the module is being copied
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the model, unless it is the pipeline's own.

        The pipeline's own are those that its class has (``forward``, hooks), and private ones that
        the model does not have.
        """
        if self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self.model, name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self) or self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self.model, name)

    def _is_own(self, name: str) -> bool:
        if name in vars(self) or hasattr(type(self), name) or "model" not in vars(self):
            return True
        return name in OWN or (name.startswith("_") and not hasattr(self.model, name))

    def install(self) -> nn.Module:
        """Make calls of the model itself run this pipeline.

        It is for trainers, which check a model's class and signature and call `save_pretrained`:
        ``Trainer(model=pipe.install(), ...)``. It uses the hook of `nn.Module.compile`, which
        copies and pickles of the model do not have.

        Returns:
            The model.
        """
        itself: Callable[..., Any] = self.model._call_impl

        def run(*args: Any, **kwargs: Any) -> Any:
            # The pipeline captures the model's own forward.
            return (itself if torch.compiler.is_exporting() else self)(*args, **kwargs)

        self.model._compiled_call_impl = run
        return self.model

    def uninstall(self) -> nn.Module:
        """Undo `install`: calls of the model run the model itself again.

        Returns:
            The model.
        """
        self.model._compiled_call_impl = None
        return self.model

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.model._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        kinds = {(x.dtype, x.device) for x in tensors}
        if all(_changes_nothing(fn, *kind, self._devices) for kind in kinds):
            return self  # every call moves parameters to their stages
        raise UnsupportedError(
            "a pipeline's parameters are on the devices of its stages",
            remedy="move or cast the model before autopipe.compile, and choose devices there",
        )


def _changes_nothing(
    fn: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    own: Sequence[torch.device],
) -> bool:
    """Whether a move or cast leaves such a tensor as it is, or puts it on one of `own` devices."""
    sample = torch.ones(8, dtype=dtype, device=device)
    shared: Callable[[Tensor], bool] = Tensor.is_shared
    before = shared(sample)
    try:
        moved = fn(sample)
    except (RuntimeError, AssertionError):  # the device is not present
        return False
    if moved.is_meta:
        return device.type == "meta"
    here = moved.device == device or moved.device in own
    same = moved.dtype == dtype and bool((moved == 1).all())  # to_empty does not copy values
    return here and same and shared(moved) == before
