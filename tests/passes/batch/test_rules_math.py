"""Operators listed as working entry by entry do so, along every dimension.

Truth is the operator itself: on parts of a tensor where it is deterministic, and by the correlation
of what it draws for two samples where it is random. Covers batch/rules_layers.py, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from autopipe.passes.batch.lattice import STATIC, Mixed, Samples, State
from autopipe.passes.batch.op_call import OpCall
from autopipe.passes.batch.propagate import RULES
from autopipe.passes.batch.rules_layers import feature_dropout
from autopipe.passes.batch.rules_math import pointwise

aten = torch.ops.aten

OPERANDS: tuple[Callable[[], Tensor], ...] = (
    lambda: torch.rand(2, 2, 2) * 0.8 + 0.1,
    lambda: torch.rand(2, 2, 2) > 0.5,
    lambda: torch.randint(1, 3, (2, 2, 2)),
)
OPERANDS_BY_NAME = {"count": torch.full((2, 2, 2), 9.0), "value": torch.tensor(1)}
NUMBERS: dict[str, Any] = {"number": 1, "float": 0.5, "int": 2, "bool": True}
DRAWS = 300

OTHERWISE = {
    aten.where.default: "it lists positions; of unknown number, which capture refuses",
    aten.one_hot.default: "the number of classes is a maximum, which capture refuses",
}
"""Overloads that do not work entry by entry, and why this is no mistake of the table."""


def operators() -> list[Any]:
    """All overloads of the table that return new tensors, and other random ones of layers."""
    found = [aten._sample_dirichlet.default]
    for packet, rule in RULES.items():
        if rule in (pointwise, feature_dropout):
            for name in packet.overloads():
                op = getattr(packet, name)
                tensors = any(str(a.type) == "Tensor" for a in op._schema.arguments)
                if tensors and not op._schema.is_mutable and op not in OTHERWISE:
                    found.append(op)
    return found


def arguments_of(op: Any) -> list[Any]:
    """Arguments for which the operator computes or draws something.

    Tensors of one dtype, or one with conditions or numbers.
    """
    if op is aten.rrelu.default:
        return [-torch.rand(2, 2, 2), 0.1, 0.3, True]
    for operand in OPERANDS:
        for further in (operand, OPERANDS[1], lambda: torch.rand(())):
            given: list[Any] = []
            for a in op._schema.arguments:
                kind = str(a.type)
                if kind == "Tensor" and a.name in OPERANDS_BY_NAME:
                    given.append(OPERANDS_BY_NAME[a.name])
                elif kind == "Tensor":
                    given.append(further() if given else operand())
                elif a.name in ("min", "max"):
                    given.append(operand() if "Tensor" in kind else 1)
                elif not a.kwarg_only:
                    default = a.has_default_value() and a.name != "training"
                    given.append(a.default_value if default else NUMBERS.get(kind))
            try:
                op(*given)
            except (RuntimeError, TypeError):
                continue
            return given
    raise AssertionError(f"no arguments for {op}")


def state_of(op: Any, args: list[Any], dim: int) -> State:
    """What the rule says where dimension `dim` of the large operands holds the samples."""
    graph, states = fx.Graph(), {}
    nodes = []
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            node = graph.placeholder(f"x{i}")
            node.meta["val"] = value
            states[node] = Samples(dim - 3 + value.dim()) if value.dim() else STATIC
            nodes.append(node)
        else:
            nodes.append(value)
    node = graph.call_function(op, tuple(nodes))
    node.meta["val"] = result(op, args)
    state: State = RULES[op.overloadpacket](OpCall(node, states))
    return state


def result(op: Any, args: list[Any]) -> Tensor:
    found = op(*(a.clone() if isinstance(a, Tensor) else a for a in args))
    first: Tensor = found[0] if isinstance(found, tuple) else found
    return first


def keeps_apart(op: Any, args: list[Any], dim: int) -> bool:
    """Whether the first and the second sample's results are what each alone would give.

    (The arc tangent gives every distribution a variance.)
    """
    if torch.Tag.nondeterministic_seeded not in op.tags:
        parts = [
            result(op, [_part(a, dim, i) if isinstance(a, Tensor) else a for a in args])
            for i in (0, 1)
        ]
        whole = result(op, args)
        return torch.allclose(torch.cat(parts, dim), whole, equal_nan=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = torch.stack([result(op, args).double() for _ in range(DRAWS)]).atan()
    a, b = (part.flatten(1) - part.flatten(1).mean(0) for part in drawn.unbind(dim + 1))
    related = (a * b).mean(0).abs() / (a.std(0) * b.std(0)).clamp(min=1e-12)
    assert a.std(0).min() > 0, "it draws"
    return related.max().item() < 0.4  # independent numbers: of the order of 1/√300 ≈ 0.06


def _part(tensor: Tensor, dim: int, i: int) -> Tensor:
    return tensor.narrow(dim, i, 1) if tensor.dim() else tensor


@pytest.mark.parametrize("op", operators(), ids=str)
def test_a_rule_is_right_for_every_dimension(op: Any) -> None:
    torch.manual_seed(0)
    args = arguments_of(op)
    for dim in range(3):
        state = state_of(op, args, dim)
        if keeps_apart(op, args, dim):
            assert state == Samples(dim)
        else:
            assert isinstance(state, Mixed)
            assert state.proven


@pytest.mark.parametrize("op", [aten.feature_dropout.default, aten.feature_alpha_dropout.default])
def test_a_dropout_that_drops_nothing_mixes_nothing(op: Any) -> None:
    x = torch.rand(2, 2, 2)
    for arguments in ([x, 0.0, True], [x, 0.5, False]):
        assert [state_of(op, arguments, dim) for dim in range(3)] == [Samples(d) for d in range(3)]
