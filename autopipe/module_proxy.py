"""Make a pipeline look like its model: parameters, state dict, modes, moves, attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autopipe.errors import UnsupportedError
from autopipe.placement import mark, unmark

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self


MODULE_NAMES = frozenset(name for name in dir(nn.Module) if not name.startswith("_"))
"""The public names that every module has."""


class ModuleProxy(nn.Module):
    """A module that shares another one's parameters, buffers, submodules and attributes.

    A name that both have is the proxy's: its class's methods and properties, and what it stores
    with `_keep`. The model's own is then ``proxy.model.name``. State dicts, names of parameters and
    `get_submodule` know the model's names only.

    Names that every module has (``type``, ``half``, ``float`` ...) are the proxy's where they are
    methods, so that a move or a cast is one of the proxy. Where the model has a value of such a
    name (``model.type = "bert"``, or a property), it is the proxy's too.

    Args:
        model: the other module.
        devices: where its parameters may be.

    Attributes:
        is_parallelizable, model_parallel: always True: libraries must not replicate it.
    """

    model: nn.Module
    is_parallelizable = True
    model_parallel = True

    def __init__(self, model: nn.Module, devices: Sequence[torch.device]) -> None:
        super().__init__()
        # A child module would add a prefix to every name; instead the registries are shared.
        self._keep("model", model)
        self._keep("_devices", tuple(devices))
        self._share()
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = model.training

    def _share(self) -> None:
        self._parameters = self.model._parameters
        self._buffers = self.model._buffers
        self._modules = self.model._modules

    def _keep(self, name: str, value: Any) -> None:
        """Store an attribute of the proxy, whatever the model calls its parts.

        (`nn.Module.__setattr__` refuses a name that one of the shared registries has.)
        """
        object.__setattr__(self, name, value)

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

    def __getattribute__(self, name: str) -> Any:
        if _is_inherited(type(self), name):
            model = vars(self).get("model")  # None: the proxy is being made or copied
            if model is not None and not _acts(value := getattr(model, name)):
                return value
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not set yet: the module is being copied
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def get_submodule(self, target: str) -> nn.Module:
        """Return a submodule of the model by its name there; the proxy itself for ``""``."""
        return self.model.get_submodule(target) if target else self

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter of the model by its name there."""
        return self.model.get_parameter(target)

    def get_buffer(self, target: str) -> Tensor:
        """Return a buffer of the model by its name there."""
        return self.model.get_buffer(target)

    def register_buffer(self, *args: Any, **kwargs: Any) -> None:
        """Register a buffer of the model."""
        self.model.register_buffer(*args, **kwargs)

    def register_parameter(self, *args: Any, **kwargs: Any) -> None:
        """Register a parameter of the model."""
        self.model.register_parameter(*args, **kwargs)

    def add_module(self, *args: Any, **kwargs: Any) -> None:
        """Add a submodule to the model; `register_module` is the same."""
        self.model.add_module(*args, **kwargs)

    register_module = add_module

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the model, unless it is the pipeline's own.

        The pipeline's own are the methods that `nn.Module` has (``forward``, ``to``), hooks, and
        private ones that the model does not have.

        Raises:
            UnsupportedError: the name is of the pipeline's public interface.
        """
        self._refuse_public(name)
        shown = _is_inherited(type(self), name) and not _acts(value)  # if the model has it
        if self._is_own(name) and not shown:
            super().__setattr__(name, value)
        else:
            setattr(self.model, name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse_public(name)
        shown = _is_inherited(type(self), name) and name in vars(self.model)
        if name in vars(self) or (self._is_own(name) and not shown):
            super().__delattr__(name)
        else:
            delattr(self.model, name)

    def _is_own(self, name: str) -> bool:
        if name in vars(self) or hasattr(type(self), name) or "model" not in vars(self):
            return True
        return name.startswith("_") and not hasattr(self.model, name)

    def _refuse_public(self, name: str) -> None:
        """Refuse to change what a proxy has beyond an ordinary module."""
        if name.startswith("_") or name == "training" or hasattr(nn.Module, name):
            return
        if name in vars(self) or hasattr(type(self), name):
            raise UnsupportedError(
                f"`{name}` is the pipeline's own and cannot be changed",
                remedy=f"the model's attribute of this name is pipe.model.{name}",
            )

    def install(self) -> nn.Module:
        """Make calls of the model itself run this pipeline.

        It is for trainers, which check a model's class and signature and call `save_pretrained`:
        ``Trainer(model=pipe.install(), ...)``. It uses the hook of `nn.Module.compile`, which
        copies and pickles of the model do not have. The attributes of `autopipe.placement` tell
        trainers that the model is on its devices.

        Returns:
            The model.
        """
        itself: Callable[..., Any] = self.model._call_impl

        def run(*args: Any, **kwargs: Any) -> Any:
            # The pipeline captures the model's own forward.
            return (itself if torch.compiler.is_exporting() else self)(*args, **kwargs)

        mark(self.model, self._devices)
        self.model._compiled_call_impl = run
        return self.model

    def uninstall(self) -> nn.Module:
        """Undo `install`: calls of the model run the model itself again.

        Returns:
            The model.
        """
        unmark(self.model)
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


def _is_inherited(kind: type[ModuleProxy], name: str) -> bool:
    """Whether every module has a name, and the proxy nothing of its own by it."""
    return name in MODULE_NAMES and getattr(kind, name) is getattr(nn.Module, name)


def _acts(value: Any) -> bool:
    """Whether a value is called to act on a module, as methods are; classes are values."""
    return callable(value) and not isinstance(value, type)


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
