"""The side of a pipeline that is the model's: names, state, modes, moves, attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autopipe.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self


class ModuleProxy(nn.Module):
    """A module with another one's parameters, buffers, submodules and attributes.

    Args:
        model: the other.
        devices: where its parameters may lie.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, devices: Sequence[torch.device]) -> None:
        super().__init__()
        # Not registered as a child, which would prefix every name: its registries are shared.
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
        """The model's own state dict, keys and values."""
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
        if name == "model":  # not there yet: a copy is being made
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def install(self) -> nn.Module:
        """Let the model's own calls run as this pipeline, and hand out the model.

        For trainers, which look at a model's class, signature and `save_pretrained`:
        ``Trainer(model=pipe.install(), ...)``. The hook is that of `nn.Module.compile`; copies and
        pickles of the model are without it.
        """
        itself: Callable[..., Any] = self.model._call_impl

        def run(*args: Any, **kwargs: Any) -> Any:
            # While the pipeline captures the model, the model is what it was.
            return (itself if torch.compiler.is_exporting() else self)(*args, **kwargs)

        self.model._compiled_call_impl = run
        return self.model

    def uninstall(self) -> nn.Module:
        """Take `install` back: the model's calls are its own again."""
        self.model._compiled_call_impl = None
        return self.model

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.model._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        looks = {(x.dtype, x.device) for x in tensors}
        if all(_keeps(fn, *look, self._devices) for look in looks):
            return self  # every call takes parameters to their stages
        raise UnsupportedError(
            "a pipeline's parameters lie where its stages need them",
            remedy="move or cast the model before autopipe.compile, and choose devices there",
        )


def _keeps(
    fn: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    own: Sequence[torch.device],
) -> bool:
    """Whether a move or cast leaves such a tensor as it is, or on one of the own devices."""
    sample = torch.ones(8, dtype=dtype, device=device)
    shared: Callable[[Tensor], bool] = Tensor.is_shared
    before = shared(sample)
    try:
        moved = fn(sample)
    except (RuntimeError, AssertionError):  # to a device that is not here
        return False
    if moved.is_meta:
        return device.type == "meta"
    here = moved.device == device or moved.device in own
    same = moved.dtype == dtype and bool((moved == 1).all())  # to_empty keeps no values
    return here and same and shared(moved) == before
