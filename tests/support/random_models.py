"""Random models: a `Program` is a description that prints as Python, a `RandomModel` executes it.

Programs are drawn by `random_drawing`; the rules of their operators stand in the other modules of
this name. What fails prints as ``Program(...)``: paste it into `RandomModel`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.support.random_kinds import RULES, Brief, Kind, Made

from . import random_integers, random_layers, random_losses, random_ops, random_views


@dataclass(frozen=True, repr=False)
class Given(Brief):
    """An input of the model."""

    kind: Kind
    grad: bool = False


@dataclass(frozen=True, repr=False)
class Held(Brief):
    """A tensor that the model holds itself: a "parameter", a "frozen" one or a "buffer"."""

    kind: Kind
    role: str = "parameter"


@dataclass(frozen=True, repr=False)
class Layer(Brief):
    """A module: a key of `LAYERS` and its sizes. `tied`: it has that layer's weight, too."""

    spec: tuple[Any, ...]
    tied: int | None = None
    frozen: bool = False


@dataclass(frozen=True, repr=False)
class Op(Brief):
    """A call: a rule's name, indices of values, the rule's number, a layer's index, a region."""

    name: str
    args: tuple[int, ...] = ()
    n: int = 0
    layer: int | None = None
    region: str = ""


@dataclass(frozen=True, repr=False)
class Program(Brief):
    """A model. Its values are numbered: inputs, held tensors, then every result of every call.

    Attributes:
        outputs: any structure; integers in it stand for values.
    """

    inputs: tuple[Given, ...]
    ops: tuple[Op, ...]
    outputs: Any
    held: tuple[Held, ...] = ()
    layers: tuple[Layer, ...] = ()

    def arguments(self, batch: int) -> tuple[Tensor, ...]:
        """Random inputs for a number of samples."""
        generator = torch.Generator().manual_seed(batch)
        return tuple(i.kind.tensor(batch, generator).requires_grad_(i.grad) for i in self.inputs)

    @property
    def in_dims(self) -> tuple[int | None, ...]:
        return tuple(i.kind.batch for i in self.inputs)


RULE_MODULES = (random_integers, random_layers, random_losses, random_ops, random_views)
"""What enters its rules in `RULES` when it is imported."""

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "linear": lambda i, o, bias: nn.Linear(i, o, bias),
    "conv1d": lambda i, o, k: nn.Conv1d(i, o, k, padding=k // 2),
    "conv2d": lambda i, o, k: nn.Conv2d(i, o, k, padding=k // 2),
    "layer_norm": nn.LayerNorm,
    "group_norm": nn.GroupNorm,
    "batch_norm": nn.BatchNorm1d,
    "dropout": nn.Dropout,
    "embedding": nn.Embedding,
    "gru": lambda i, o: nn.GRU(i, o, batch_first=True),
}
WEIGHTS: dict[str, Callable[..., tuple[int, int]]] = {
    "linear": lambda i, o, bias: (o, i),
    "embedding": lambda high, dim: (high, dim),
}
"""Shapes of the weights that may be tied and used as values."""


def weight(n: int, layers: Sequence[Layer]) -> tuple[int, Made] | None:
    """The value of some layer's weight: the one operator that no rule knows."""
    able = [i for i, layer in enumerate(layers) if layer.spec[0] in WEIGHTS]
    if not able:
        return None
    index = able[n % len(able)]
    name, *sizes = layers[index].spec
    kind = Kind(WEIGHTS[name](*sizes), batch=None)
    return index, Made(lambda m: m.weight, (kind,), layer=layers[index].spec, saves="")


def made(op: Op, kinds: Sequence[Kind], layers: Sequence[Layer]) -> Made:
    """The operator behind a call of a program."""
    if op.name == "weight":
        assert op.layer is not None
        found = weight(0, [layers[op.layer]])
        assert found is not None
        return found[1]
    result = RULES[op.name](op.n, *(kinds[i] for i in op.args))
    assert result is not None, f"{op} does not apply to {[kinds[i] for i in op.args]}"
    return result


REGIONS: dict[str, Callable[[], Any]] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_autocast": lambda: torch.autocast("cpu", enabled=False),
}
"""Double precision is left alone by autocast, but its regions are in the graph."""


class RandomModel(nn.Module):
    """Executes a program, in double precision. `train` is its mode from the start.

    A view made in a no_grad region is detached, unless it is the very tensor: eager torch says of
    it that it requires a gradient, while none can ever flow through it (``grad_fn`` is None).
    """

    def __init__(self, program: Program, train: bool = True) -> None:
        super().__init__()
        self.program = program
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(LAYERS[spec.spec[0]](*spec.spec[1:]) for spec in program.layers)
        self.double()
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        for i, held in enumerate(program.held):
            tensor = held.kind.tensor(0, generator)
            if held.role == "buffer":
                self.register_buffer(f"held{i}", tensor)
            else:
                setattr(self, f"held{i}", nn.Parameter(tensor, held.role == "parameter"))
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.6, generator=generator)
        for layer, spec in zip(self.layers, program.layers, strict=True):
            if spec.tied is not None:
                layer.weight = self.layers[spec.tied].weight
            layer.requires_grad_(not spec.frozen)
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0 if train else 0.5
            if isinstance(layer, nn.BatchNorm1d):
                layer.running_var.uniform_(0.5, 1.5, generator=generator)
        kinds = [g.kind for g in program.inputs] + [h.kind for h in program.held]
        self.plan: list[Made] = []
        for op in program.ops:
            self.plan.append(made(op, kinds, program.layers))
            kinds += self.plan[-1].kinds
        self.train(train)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        values = self.values(*args, **kwargs)
        return pytree.tree_map_only(int, lambda i: values[i], self.program.outputs)

    def values(self, *args: Tensor, **kwargs: Tensor) -> list[Tensor]:
        """All values of the program."""
        values = [*args, *kwargs.values()]
        values += [getattr(self, f"held{i}") for i in range(len(self.program.held))]
        pairs = zip(self.program.ops, self.plan, strict=True)
        for region, calls in itertools.groupby(pairs, key=lambda pair: pair[0].region):
            with contextlib.ExitStack() as stack:
                for name in region.split():
                    stack.enter_context(REGIONS[name]())
                for op, plan in calls:
                    layer = [] if op.layer is None else [self.layers[op.layer]]
                    result = plan.run(*layer, *(values[i] for i in op.args))
                    if plan.view and "no_grad" in region:
                        same = () if op.name == "dropout" else op.args  # see test_bugs_graphs
                        result = _detached(result, [values[i] for i in same])
                    values += [result] if isinstance(result, Tensor) else result
        return values


def _detached(result: Any, given: Sequence[Tensor]) -> Any:
    """The result, or all parts of it, detached; but not what a call returned as it was given."""
    known = {id(t) for t in given}
    return pytree.tree_map(lambda t: t if id(t) in known else t.detach(), result)
