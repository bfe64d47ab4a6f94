"""Random programs for hypothesis: `programs()`.

What is drawn is a list of `Gene`s, each the name of an operator and small numbers that choose among
the values there are; a gene that fits no values is left out. So a list that hypothesis has
shortened is still a program, and failures shrink to a few operators.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from tests.support.random_kinds import RULES, Kind, Made, arity
from tests.support.random_models import (
    REGIONS,
    WEIGHTS,
    Given,
    Held,
    Layer,
    Op,
    Program,
    made,
    weight,
)

from . import random_ops

ELEMENTWISE = (*random_ops.UNARY, *random_ops.BINARY)
SHAPES_ONLY = {"filled": 0, "for_each_sample": 1, "unmerge": 1, "weighted_cross_entropy": 1}
"""How many arguments of an operator gradients flow to, where they do not flow to all."""
ROWS = 160
"""Entries per sample that a value may have at most."""


@dataclass(frozen=True)
class Gene:
    """What is drawn for one call. `picks`: how far back to look first for each argument."""

    name: str
    picks: tuple[int, int, int]
    n: int
    share: str
    region: str


@dataclass
class Value:
    """What the drawing must know of a value, beside its kind.

    Attributes:
        memory: values with the same number share memory.
        grad: it certainly requires a gradient.
        fixed: it must not be written to.
        outer: it may be a result (autopipe's tests compare no complex ones).
    """

    kind: Kind
    memory: int
    grad: bool = False
    fixed: bool = False


@dataclass
class Draft:
    """A program in the making: it knows which operators may follow."""

    inputs: tuple[Given, ...]
    held: tuple[Held, ...]
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    closed: set[int] = field(default_factory=set)  # memory that nothing may write to any more

    def __post_init__(self) -> None:
        for item in (*self.inputs, *self.held):
            grad = item.grad if isinstance(item, Given) else item.role == "parameter"
            self.values.append(Value(item.kind, len(self.values), grad))
        self.closed.update(range(len(self.values)))

    def add(self, gene: Gene) -> None:
        """Append the call that a gene stands for, if there is one."""
        region = self.ops[-1].region if gene.region == "same" and self.ops else gene.region
        region = "" if region == "same" else region
        if gene.name == "weight":
            found = weight(gene.n, self.layers)
            if found is not None:
                index, result = found
                self.append(Op("weight", (), 0, index, region), result)
            return
        for args in self.arguments(gene):
            n, result = self.number(gene, args)
            if result is not None and self.may(result, args, region):
                layer = None if result.layer is None else self.layer(result.layer, gene.share)
                self.append(Op(gene.name, args, n, layer, region), result)
                return

    def arguments(self, gene: Gene) -> Iterator[tuple[int, ...]]:
        """Choices of values, the wanted ones first; dtypes that cannot do are left out early."""
        count = arity(RULES[gene.name])
        orders = []
        for pick in gene.picks[:count]:
            recent = list(range(len(self.values)))[::-1]
            orders.append(recent[pick % len(recent) :] + recent[: pick % len(recent)])
        return itertools.islice(itertools.product(*orders), 1500)

    def number(self, gene: Gene, args: tuple[int, ...]) -> tuple[int, Made | None]:
        """The rule's number: the gene's, or one for which there is a layer to share."""
        kinds = [self.values[i].kind for i in args]
        function = RULES[gene.name]
        first = function(gene.n, *kinds)
        if gene.share == "same" and first is not None and first.layer is not None:
            specs = {layer.spec for layer in self.layers}
            for n in range(12):
                other = function(n, *kinds)
                if other is not None and other.layer in specs:
                    return n, other
        return gene.n, first

    def may(self, result: Made, args: tuple[int, ...], region: str) -> bool:
        """Small enough; and what is written to is no input, not saved, and not an odd view."""
        if any(k.numel > ROWS or len(k.shape) > 4 for k in result.kinds):
            return False
        if not result.writes:
            return True
        target, *others = (self.values[i] for i in args)
        if target.fixed or target.memory in self.closed:
            return False
        return all(v.memory != target.memory for v in others)

    def layer(self, spec: tuple[Any, ...], share: str) -> int:
        same = [i for i, layer in enumerate(self.layers) if layer.spec == spec]
        if share == "same" and same:
            return same[-1]
        tied = None
        if share == "tied" and spec[0] in WEIGHTS:
            shape = WEIGHTS[spec[0]](*spec[1:])
            for i, layer in enumerate(self.layers):
                name, *sizes = layer.spec
                if layer.tied is None and name in WEIGHTS and WEIGHTS[name](*sizes) == shape:
                    tied = i
        self.layers.append(Layer(spec, tied, share == "frozen"))
        return len(self.layers) - 1

    def append(self, op: Op, result: Made) -> None:
        self.ops.append(op)
        self.used.update(op.args)
        arguments = [self.values[i] for i in op.args]
        without = "no_grad" in op.region or op.name == "detach"
        grad = any(v.grad for v in arguments[: SHAPES_ONLY.get(op.name)])
        without |= op.name == "weigh" and op.n % 3 == 2
        if op.layer is not None:
            layer = self.layers[op.layer]
            grad |= not layer.frozen and layer.tied is None and layer.spec[0] != "dropout"
        first = len(self.values)
        for i, kind in enumerate(result.kinds):
            memory = arguments[0].memory if result.view and arguments else first + i
            differentiable = kind.dtype in ("float", "complex") and grad and not without
            if result.writes:
                differentiable = arguments[0].grad
            fixed = result.fixed or (result.view and bool(arguments) and arguments[0].fixed)
            fixed |= without and not result.writes and op.name not in ELEMENTWISE
            self.values.append(Value(kind, memory, differentiable, fixed))
        if op.name in ("weight", "constant"):
            self.closed.add(first)
        if result.view and "no_grad" in op.region and not result.writes:
            self.closed.update(v.memory for v in arguments)
        if result.fixed and arguments:
            self.closed.add(arguments[0].memory)
        if "i" in result.saves:
            self.closed.update(v.memory for v in arguments[result.writes :])
        if "o" in result.saves:
            self.closed.update(v.memory for v in self.values[first:])

    def program(self, form: int, picks: Sequence[int]) -> Program:
        """The program, its outputs chosen and put in a structure.

        The last value is always one. With ``form % 2``, so is every value that nothing used.
        """
        if not self.ops:
            self.probe()
        count = len(self.values)
        able = [i for i, v in enumerate(self.values) if v.kind.dtype != "complex"][::-1]
        chosen = [able[0], *(able[p % len(able)] for p in picks)]
        if form % 2:
            chosen += [
                i
                for i in range(len(self.inputs) + len(self.held), count)
                if i in able and i not in self.used and i not in chosen
            ]
        if not any(self.values[i].grad for i in chosen):
            sure = [i for i in able if self.values[i].grad]
            chosen.append(sure[0] if sure else self.probe())
        return Program(
            self.inputs,
            tuple(self.ops),
            self.structure(chosen, form // 2),
            self.held,
            tuple(self.layers),
        )

    def probe(self) -> int:
        """A value with a gradient, where the program has none: the first input, which is float."""
        self.inputs = (replace(self.inputs[0], grad=True), *self.inputs[1:])
        self.append(Op("halve", (0,)), made(Op("halve", (0,)), [self.values[0].kind], ()))
        return len(self.values) - 1

    def structure(self, chosen: list[int], form: int) -> Any:
        loss = Kind(batch=None, reduced=True)
        losses = [i for i in chosen if self.values[i].kind == loss and self.values[i].grad]
        if losses and form % 2:
            rest = [i for i in chosen if i != losses[0]]
            return {"loss": losses[0], "rest": tuple(rest), "note": None}
        head, *tail = chosen
        if not tail and form < 3:
            return head
        half = len(tail) // 2
        return (
            tuple(chosen),
            {f"v{n}": i for n, i in enumerate(chosen)},
            {"head": head, "tail": (tail[:half], {"more": tuple(tail[half:]), "flag": "text"})},
        )[form % 3]


SIZES = st.sampled_from((4, 3, 2, 1, 5, 6))


@st.composite
def kinds(draw: st.DrawFn, like: tuple[int, ...], batched: bool | None = None) -> Kind:
    """Kinds of inputs and held tensors: the sizes those of `like`, some of them, or others."""
    rank = draw(st.sampled_from((1, 2, 2, 3, 0)))
    others = tuple(draw(SIZES) for _ in range(rank))
    shape = draw(st.sampled_from((others, like, like[:-1], like[1:], like[-1:] * 2)))
    dtype = draw(st.sampled_from(("float", "float", "float", "long", "long", "bool")))
    if batched is None:
        batched = draw(st.sampled_from((True, True, True, False)))
    batch = (draw(st.sampled_from((0, 0, 0, 1))) if shape else 0) if batched else None
    return Kind(shape, dtype, batch, high=5 if dtype == "long" else 0)


LAYERED = (
    "linear",
    "linear",
    "conv1d",
    "conv2d",
    "layer_norm",
    "embedding",
    "attention",
    "softmax",
)
JOINING = ("add", "mul", "cat", "where", "matmul", "project", "masked_fill", "gather", "weight")
WRITING = ("add_", "mul_", "relu_", "mul_number_", "masked_fill_", "assign", "copy_")
SEEING = ("transpose", "select", "slice", "chunk", "split", "expand", "permute", "alias", "detach")
WHOLE = ("argmax", "greater", "less", "equals", "quantize", "as_complex", "rfft", "irfft", "merge")
WHOLE += ("lower_triangle", "masked_attention", "upsample")
LOSSES = (
    "cross_entropy",
    "mean",
    "weighted_cross_entropy",
    "mse",
    "masked_mean",
    "add_losses",
    "weigh",
    "sum",
    "hits",
)
COMMON = (*LAYERED, *JOINING, *WRITING, *SEEING, *WHOLE, *LOSSES, "tanh", "relu", "gelu")
NAMES = (*COMMON, *sorted(RULES), *COMMON)
PICK = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 30))
REGION = st.sampled_from(("",) * 12 + ("same",) * 4 + (*REGIONS, "no_autocast no_grad"))
GENES = st.builds(
    Gene,
    name=st.sampled_from(NAMES),
    picks=st.tuples(PICK, PICK, PICK),
    n=st.integers(0, 11),
    share=st.sampled_from(("new", "new", "same", "tied", "frozen")),
    region=REGION,
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Programs of up to 25 operators or so (of 48 genes, many of which fit nowhere)."""
    first = replace(draw(kinds((4, 2), batched=True)), dtype="float", high=0)
    given = [Given(first, draw(st.booleans()))]
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(kinds(first.shape))
        given.append(Given(kind, draw(st.booleans()) and kind.dtype == "float"))
    held = []
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(kinds(first.shape, batched=False))
        role = draw(st.sampled_from(("parameter", "buffer", "frozen")))
        held.append(Held(kind, role if kind.dtype == "float" else "buffer"))
    draft = Draft(tuple(given), tuple(held))
    for _ in range(4):  # four short lists: one long one would be short as a rule
        for gene in draw(st.lists(GENES, max_size=12)):
            draft.add(gene)
    return draft.program(draw(st.integers(0, 11)), draw(st.lists(st.integers(0, 30), max_size=3)))
