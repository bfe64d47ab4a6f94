"""A program that can run, and everything that it depends on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from autopipe.passes.ir import B

if TYPE_CHECKING:
    from collections.abc import Hashable

    import torch

    from autopipe.passes.driver import Lowered
    from autopipe.passes.ir import Sizes
    from autopipe.passes.phases import TensorMeta
    from autopipe.runtime.program import Program


class ProgramKey(NamedTuple):
    """Everything that a captured model's program depends on.

    Attributes:
        sizes: samples in each micro-batch.
        grad: whether there will be a backward.
        expected: names of the outputs that will receive a gradient.
        parameters: for each parameter, whether it requires a gradient, and its dtype.
        inputs: for each distinct micro-batch size, names and metadata of the call's tensors.
        autocast: as `call_guards.autocast_state` returns it.
        lengths: (name of a length, its value) for each.
        early_backward: whether backwards may start before all forwards have ended.
    """

    sizes: tuple[int, ...]
    grad: bool
    expected: frozenset[str]
    parameters: tuple[tuple[bool, torch.dtype], ...]
    inputs: tuple[tuple[tuple[str, TensorMeta], ...], ...]
    autocast: tuple[tuple[bool, torch.dtype], ...]
    lengths: tuple[tuple[Any, int], ...]
    early_backward: bool

    @property
    def modes(self) -> Hashable:
        """What does not depend on sizes."""
        return self.grad, self.expected, self.parameters, self.autocast

    def metadata(self, size: int) -> dict[str, TensorMeta]:
        """Metadata of the call's tensors in a micro-batch of one size."""
        return dict(self.inputs[list(dict.fromkeys(self.sizes)).index(size)])


@dataclass(frozen=True, eq=False)
class CompiledProgram:
    """A program that can run, and the passes' results that it was generated from.

    Attributes:
        key: what it depends on.
        program: its functions, and what the runtime needs besides.
        lowered: phases, schedule and source.
    """

    key: ProgramKey
    program: Program
    lowered: Lowered

    def sizes(self, size: int) -> Sizes:
        """The values of all symbols in a micro-batch, or in a whole batch, of one size."""
        return {B: size, **dict(self.key.lengths)}

    def described(self, name: str) -> str:
        """Name a value of generated code for the user.

        Args:
            name: in generated code.

        Returns:
            A parameter, buffer or input by its own name; another value by that of its node.
        """
        phased = self.lowered.phased[self.key.sizes[0]]
        for stage in phased.stages:
            name = stage.labels.get(name, name)
        known = {i.name: i for i in phased.split.captured.inputs}
        if name not in known:
            return name
        item = known[name]
        return f"{item.kind} {item.target or item.name}"

    @cached_property
    def updates(self) -> frozenset[str]:
        """Names of the buffers that the forward writes to."""
        cuts = self.lowered.phased.values()
        return frozenset(n for cut in cuts for stage in cut.stages for n in stage.updates)

    @cached_property
    def read_by_backward(self) -> frozenset[str]:
        """Names of the parameters, buffers and constants whose values the backward reads."""
        found: set[str] = set()
        for cut in self.lowered.phased.values():
            for stage in cut.stages:
                placeholders = [n for n in stage.graph.nodes if n.op == "placeholder"]
                for name, node in zip(stage.state, placeholders[1:], strict=False):
                    if any(stage.phase_of.get(user.name, "F") != "F" for user in node.users):
                        found.add(name)
        return frozenset(found)

    @property
    def differentiable(self) -> frozenset[str]:
        """Names of the outputs that can receive a gradient."""
        return next(iter(self.lowered.phased.values())).differentiable

    @property
    def differentiated(self) -> frozenset[str]:
        """Names of the outputs that the backward expects a gradient for."""
        return next(iter(self.lowered.phased.values())).differentiated
