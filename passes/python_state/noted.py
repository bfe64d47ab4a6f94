"""Holders of what a forward asks for while it runs: flags of tensors, variables of the process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .holders import CONTENT, Holder, Missing

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping


def check_remark(line: str) -> str:
    """What the user is told of a check of values that was passed over."""
    return f"checks values of tensors ({line}); the pipeline does not make this check"


class _Compared(Holder):
    """Is compared only: a forward does not change it."""

    def write(self, key: Hashable, value: Any) -> None:
        """Change nothing."""


class GradientFlags(_Compared):
    """Which parameters and buffers of a model need gradients.

    Args:
        owner: the model.
        label: what messages call it.
    """

    owner: nn.Module

    def get(self, key: Hashable) -> Any:
        """Read one flag, by the name of its tensor."""
        path, _, name = str(key).rpartition(".")
        try:
            found = getattr(self.owner.get_submodule(path), name)
        except AttributeError:  # it is gone
            return Missing
        return found.requires_grad if isinstance(found, Tensor) else Missing

    def name_of(self, key: Hashable) -> str:
        return f"{key}.requires_grad"


class TensorValues(_Compared):
    """The values of a tensor, by the count of changes in place.

    Args:
        owner: the tensor.
        label: what messages call it.
    """

    owner: Tensor

    def get(self, key: Hashable) -> Any:
        return self.owner._version

    def name_of(self, key: Hashable) -> str:
        return self.label


class Environment(_Compared):
    """Variables of the process's environment."""

    def __init__(self) -> None:
        super().__init__(os.environ, "os.environ")

    def get(self, key: Hashable) -> Any:
        return os.environ.get(str(key), Missing)

    def name_of(self, key: Hashable) -> str:
        return f"os.environ[{key!r}]"


class Answers(_Compared):
    """What functions of torch told about the process: ``torch.distributed.is_initialized()``."""

    def __init__(self) -> None:
        super().__init__(None, "")

    def get(self, key: Hashable) -> Any:
        """Ask once more: call the function with the same arguments."""
        assert isinstance(key, tuple)
        function, *arguments = key
        try:
            return function(*arguments)
        except Exception:  # there is no answer now
            return Missing

    def name_of(self, key: Hashable) -> str:
        """The call, as code."""
        assert isinstance(key, tuple)
        function, *arguments = key
        return f"{function.__module__}.{function.__name__}({', '.join(map(repr, arguments))})"


class Noted:
    """What a forward asked for.

    Args:
        model: the model.

    Attributes:
        flags: name of a parameter → whether it needed gradients.
        environment: variable → its value, or `Missing`.
        remarks: for the user: what the forward does that a pipeline does not.
        notes: for `explain()`: what a pipeline does in another way.
        clocks: function that tells the time → the line that calls it.
        answers: (function of torch, arguments) → what it returned.
        arguments: what it asked of its arguments: fields of `ArgumentReads`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.flags: dict[Hashable, Any] = {}
        self.environment: dict[Hashable, Any] = {}
        self.remarks: dict[str, None] = {}
        self.notes: dict[str, None] = {}
        self.clocks: dict[str, str] = {}
        self.answers: dict[Hashable, Any] = {}
        self.arguments: set[str] = set()
        self._tensors: list[tuple[Holder, dict[Hashable, Any]]] = []

    def note_values(self, tensor: Tensor, place: str | None) -> None:
        """Note that the values of a tensor became Python values.

        Args:
            tensor: no tensor of the trace.
            place: where it was found.
        """
        self._tensors.append(
            (TensorValues(tensor, place or "a tensor"), {CONTENT: tensor._version})
        )

    def note_variable(self, name: str) -> None:
        """Note that a variable of the environment was read."""
        self.environment[name] = os.environ.get(name, Missing)

    def note_answer(self, asked: tuple[Any, ...], answer: Any) -> None:
        """Note what a function of torch returned; None also stands for an exception."""
        self.answers[asked] = Answers().get(asked) if answer is None else answer

    def note_print(self, line: str) -> None:
        """Note that the forward printed something."""
        self.remarks[
            f"prints ({line}) only while it is captured, when tensors have no values; return what"
            " is to be seen, and print it outside of the pipeline"
        ] = None

    def note_outside(self, function: str, line: str, *, clock: bool) -> None:
        """Note that a function was called that asks for something outside of the process."""
        self.remarks[
            f"calls {function} ({line}); the pipeline does not call it again, and goes on with"
            " what it returned"
        ] = None
        if clock:
            self.clocks.setdefault(function, line)

    def note_check(self, line: str) -> None:
        """Note that a check of values was passed over."""
        self.remarks[check_remark(line)] = None

    def note_checkpoint(self, line: str) -> None:
        """Note that the forward marks a region that eager autograd would run again."""
        self.notes[
            f"torch.utils.checkpoint ({line}) has no effect here: remat decides what is recomputed"
        ] = None

    def note_type_comparison(self, line: str) -> None:
        """Note that a function compares the type of an object with a tensor's."""
        self.remarks[
            f"compares a type with torch.Tensor or nn.Parameter ({line}); while a model is"
            " captured, the type of tensors is another one: use isinstance"
        ] = None

    def note_flags(self, names: Mapping[str, bool]) -> None:
        """Note that ``requires_grad`` was read, by names of parameters and buffers."""
        self.flags.update(names)

    def holders(self) -> list[tuple[Holder, dict[Hashable, Any]]]:
        """What was noted, as holders and the values that were read."""
        found: list[tuple[Holder, dict[Hashable, Any]]] = [
            (GradientFlags(self._model, ""), self.flags),
            (Environment(), self.environment),
            (Answers(), self.answers),
        ]
        return [*((h, v) for h, v in found if v), *self._tensors]
