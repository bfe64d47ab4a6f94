"""Every rule of every program level, broken on purpose, and what each level prints.

Covers ir/values.py, ir/captured.py, ir/split.py and ir/phased.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx, nn

from autopipe.errors import VerifyError
from autopipe.passes.ir.captured import Annotated, Captured, GradFlow, NodeCost
from autopipe.passes.ir.combine import Concatenate
from autopipe.passes.ir.phased import Phased, StagePhases
from autopipe.passes.ir.split import CALLER, Route, Split
from autopipe.passes.ir.values import B, InputKind, Output, TensorSpec, at_batch
from tests.support.programs import calls, copied, node, phased_of, split_of

ZERO = sympy.Integer(0)


class Model(nn.Module):
    """A parameter that both stages use, a constant, a buffer that changes, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.first.weight = self.last.weight
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.steps += 1
        x = torch.tanh(self.first(x)) * torch.tensor([1.0, 2, 3, 4, 5, 6])
        x = torch.relu(self.last(x))
        return x, x.mean()


@functools.cache
def programs() -> tuple[Captured, Annotated, Split, Phased]:
    torch.manual_seed(0)
    model = Model()
    x = torch.randn(4, 6)
    cut = split_of(model, 2, x)
    phased = phased_of(cut, model, 2, ((x,), {}))
    return cut.captured, cut.annotated, cut, phased


def captured() -> Captured:
    return programs()[0]


def cut() -> Split:
    return programs()[2]


def phased() -> Phased:
    return programs()[3]


def broken(program: Any, problem: str, *facts: str) -> None:
    """`program` breaks the rule that `problem` states, and the message holds the facts."""
    with pytest.raises(VerifyError, match=re.escape(problem)) as caught:
        program.verify()
    for fact in facts:
        assert fact in str(caught.value)


def test_sound_programs_verify() -> None:
    for program in programs():
        program.verify()
    for stage in phased().stages:
        stage.verify()


# ------------------------------------------------------------------------------- sizes and looks


def test_size_expressions_take_values() -> None:
    assert at_batch(3 * B + 1, 5) == 16
    assert at_batch(7, 5) == 7
    spec = TensorSpec("x", (sympy.Integer(3), 2 * B, B), torch.float16)
    assert at_batch(spec.numel, 4) == 3 * 8 * 4
    assert at_batch(spec.nbytes, 4) == 3 * 8 * 4 * 2
    assert spec.batch_dim == 1
    assert TensorSpec("y", (sympy.Integer(3),), torch.int64).batch_dim is None
    assert str(spec) == "x: float16[3, 2*B, B]"


# ------------------------------------------------------------------------------- outputs


SPEC = TensorSpec("y", (B,), torch.float32)


def test_an_output_with_an_unknown_combination() -> None:
    broken(Output(SPEC, "max"), "unknown combination", "node: y", "max")  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [-1, 1])
def test_an_output_concatenated_along_a_dimension_that_it_lacks(dim: int) -> None:
    problem = "a concatenation along a dimension that the output does not have"
    broken(Output(SPEC, Concatenate(dim)), problem, "node: y", f"found: {dim}")


# ------------------------------------------------------------------------------- Captured


def test_captured_with_inputs_in_another_order() -> None:
    program = dataclasses.replace(captured(), inputs=captured().inputs[::-1])
    names = [i.name for i in captured().inputs]
    broken(program, "placeholders and inputs differ", f"expected: {names[::-1]}", f"found: {names}")


def test_captured_with_an_output_left_out() -> None:
    program = dataclasses.replace(captured(), outputs=captured().outputs[:1])
    broken(program, "results and outputs differ", f"expected: ['{captured().outputs[0].name}']")


def test_captured_verifies_its_outputs() -> None:
    first, *rest = captured().outputs
    bad = dataclasses.replace(first, combine="median")
    broken(dataclasses.replace(captured(), outputs=(bad, *rest)), "unknown combination", "median")


def test_captured_with_a_call_of_a_method() -> None:
    module = copied(captured().graph_module)
    tanh = calls(module.graph, torch.ops.aten.tanh.default)[0]
    tanh.op, tanh.target = "call_method", "tanh"
    program = dataclasses.replace(captured(), graph_module=module)
    broken(
        program,
        "only placeholders, calls and the output",
        f"node: {tanh.name}",
        "found: call_method",
    )


def test_captured_with_a_node_of_unknown_looks() -> None:
    module = copied(captured().graph_module)
    tanh = calls(module.graph, torch.ops.aten.tanh.default)[0]
    tanh.meta = {}
    program = dataclasses.replace(captured(), graph_module=module)
    broken(program, "a node without metadata", f"node: {tanh.name}")


def test_captured_with_a_constant_that_is_missing() -> None:
    (constant,) = [i for i in captured().inputs if i.kind is InputKind.CONSTANT]
    program = dataclasses.replace(captured(), constants={})
    broken(program, "a constant without a value", f"node: {constant.name}")


def test_captured_prints_calls_and_combinations() -> None:
    text = str(captured())
    assert "torch.ops.aten.tanh.default" in text
    assert "float32[B, 6]  combined by cat" in text
    assert "float32[]  combined by mean" in text


def test_captured_prints_its_epilogue() -> None:
    class Ratio(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum().exp()

    text = str(split_of(Ratio(), 1, torch.ones(4, 6)).captured)
    assert "epilogue: " in text
    assert "torch.ops.aten.exp.default" in text.split("epilogue: ")[1]


# ------------------------------------------------------------------------------- Annotated


def test_annotated_with_a_node_without_cost() -> None:
    program = programs()[1]
    tanh = calls(captured().graph_module.graph, torch.ops.aten.tanh.default)[0].name
    costs = {n: c for n, c in program.costs.items() if n != tanh}
    broken(Annotated(captured(), costs), "a node without a cost", f"node: {tanh}")


EXPRESSIONS = (
    "forward_flops",
    "forward_bytes",
    "activation_bytes",
    "backward_flops",
    "backward_bytes",
    "saved_bytes",
)


@pytest.mark.parametrize("field", EXPRESSIONS)
def test_annotated_with_a_cost_in_another_symbol(field: str) -> None:
    program = programs()[1]
    name, cost = next(iter(program.costs.items()))
    bad = dataclasses.replace(cost, **{field: 2 * sympy.Symbol("s7")})
    broken(
        Annotated(captured(), {**program.costs, name: bad}),
        "a cost may depend only on the batch size",
        f"node: {name}",
        f"found: {field} 2*s7",
    )


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [("kind", "sorting", "unknown kind of work"), ("precision", "fp8", "unknown precision")],
)
def test_annotated_with_work_that_no_device_knows(field: str, value: str, problem: str) -> None:
    program = programs()[1]
    name, cost = next(iter(program.costs.items()))
    bad: Any = {field: value}
    broken(
        Annotated(captured(), {**program.costs, name: dataclasses.replace(cost, **bad)}),
        problem,
        f"node: {name}",
        f"found: {value}",
    )


def test_annotated_with_gradients_of_a_node_that_is_not_there() -> None:
    program = programs()[1]
    flows = {**program.flows, "elsewhere": GradFlow(((True,),), (True,))}
    bad = Annotated(captured(), program.costs, flows)
    broken(bad, "gradient flow of a node without a cost", "node: elsewhere")


def test_annotated_prints_costs() -> None:
    cost = NodeCost(7 * B, backward_flops=14 * B, exact=False)
    text = str(Annotated(captured(), {"linear": cost}))
    assert re.search(r"linear +7\*B flops +14\*B backward +0 B moved +0 B saved", text)
    assert "(estimated)" in text


# ------------------------------------------------------------------------------- Split


def with_stage(k: int, **changes: Any) -> Split:
    stages = [dataclasses.replace(s, **changes) if s.index == k else s for s in cut().stages]
    return dataclasses.replace(cut(), stages=tuple(stages))


def with_route(name: str, **changes: Any) -> Split:
    routes = {**cut().routes, name: dataclasses.replace(cut().routes[name], **changes)}
    return dataclasses.replace(cut(), routes=routes)


def route(kind: str) -> Route:
    """A route of this kind that stage 1 is on."""
    return next(r for r in cut().routes.values() if r.kind == kind and 1 in r.consumers)


def test_split_with_a_signature_that_differs_from_the_placeholders() -> None:
    stage = cut().stages[0]
    broken(
        with_stage(0, receives=("other",)),
        "stage 0: placeholders differ from its signature",
        "'other'",
        f"'{stage.receives[0]}'",
    )


def test_split_with_a_parameter_in_two_stages() -> None:
    shared = route("parameter").name
    first, second = cut().stages
    item = next(i for i in first.held if i.name == shared)
    # The second stage claims to own what is shared with it; its placeholders have the same order.
    assert second.signature == [*(i.name for i in second.held), shared, *second.receives]
    bad = with_stage(1, held=(*second.held, item), shared=())
    broken(bad, "a parameter held by two stages", f"node: {shared}")


def test_split_with_a_value_that_flows_back() -> None:
    name = route("activation").name
    bad = with_route(name, source=1, consumers=(0,))
    broken(bad, "from earlier to later stages", f"node: {name}", "found: (1, 0)")


def test_split_with_a_value_that_its_consumer_does_not_receive() -> None:
    stage = cut().stages[1]
    name = stage.receives[-1]
    assert cut().routes[name].kind == "activation"
    module = copied(stage.graph_module)
    module.graph.node_copy(node(module.graph, name))  # keeps users; the signature forgets it
    broken(with_stage(1, receives=stage.receives[:-1]), "stage 1 does not receive", f"node: {name}")


def test_split_with_a_value_that_its_source_does_not_return() -> None:
    name = route("activation").name
    broken(with_stage(0, returns=()), "stage 0 does not return", f"node: {name}")


def test_split_with_an_output_without_a_route() -> None:
    name = captured().outputs[0].name
    routes = {n: r for n, r in cut().routes.items() if n != name}
    broken(dataclasses.replace(cut(), routes=routes), "an output without a route", f"node: {name}")
    broken(with_route(name, output=None), "an output without a route", f"node: {name}")
    broken(with_route(name, output=1), "an output without a route", f"node: {name}")


def test_split_prints_stages_and_routes() -> None:
    text = str(cut())
    assert "stage 0: class Stage0" in text
    assert "stage 1: class Stage1" in text
    assert f"{route('activation').spec}  activation 0 -> [1]" in text
    assert f"{route('parameter').spec}  parameter 0 -> [1]" in text


SHARED = Route(SPEC, "activation", 1, (3, 4))
SHARED_BY_CALLER = Route(SPEC, "input", CALLER, (0, 2))


@pytest.mark.parametrize(
    ("value", "stage", "before", "after"),
    [  # the sum of gradients travels from the last holder to the first
        (SHARED, 4, None, 3),
        (SHARED, 3, 4, 1),
        (SHARED, 1, 3, None),
        (SHARED_BY_CALLER, 2, None, 0),
        (SHARED_BY_CALLER, 0, 2, CALLER),
    ],
)
def test_gradients_of_a_shared_value_go_from_holder_to_holder(
    value: Route, stage: int, before: int | None, after: int | None
) -> None:
    assert value.gradient_from(stage) == before
    assert value.gradient_to(stage) == after


# ------------------------------------------------------------------------------- Phased


def stage_with(k: int, **changes: Any) -> StagePhases:
    return dataclasses.replace(phased().stages[k], **changes)


def phase_with(stage: StagePhases, change: Callable[[dict[str, str]], None]) -> StagePhases:
    phase_of = dict(stage.phase_of)
    change(phase_of)
    return dataclasses.replace(stage, phase_of=phase_of)


@pytest.mark.parametrize("letter", [None, "G"])
def test_phases_with_a_node_in_none(letter: str | None) -> None:
    stage = phased().stages[0]
    name = next(n for n, p in stage.phase_of.items() if p == "F")
    changed = {n: p for n, p in stage.phase_of.items() if n != name}
    if letter is not None:
        changed[name] = letter
    bad = dataclasses.replace(stage, phase_of=changed)
    broken(bad, "stage 0: a node without a phase", f"node: {name}")


def inner_edge(stage: StagePhases, phase: str) -> tuple[fx.Node, fx.Node]:
    """A node of a phase and a node of the same phase that it uses."""
    return next(
        (source, user)
        for user in calls(stage.graph)
        for source in user.all_input_nodes
        if stage.phase_of.get(user.name) == stage.phase_of.get(source.name) == phase
    )


def test_phases_with_a_value_from_a_later_phase() -> None:
    stage = phased().stages[0]
    source, user = inner_edge(stage, "F")
    bad = phase_with(stage, lambda p: p.update({source.name: "B"}))
    with pytest.raises(VerifyError, match="stage 0: phase F needs a value of the later phase B"):
        bad.verify()
    assert source in user.all_input_nodes


def test_phases_with_a_value_that_is_not_kept() -> None:
    model, x = Model(), torch.randn(4, 6)
    program = phased_of(split_of(model, 2, x), model, 2, ((x,), {}), remat="none")
    stage = program.stages[1]
    kept = next(n for n in stage.saved if n in stage.phase_of)
    saved = tuple(n for n in stage.saved if n != kept)
    broken(
        dataclasses.replace(stage, saved=saved),
        "needs a value that F does not save",
        f"found: {kept}",
    )


def test_phased_verifies_its_stages() -> None:
    stages = (stage_with(0, phase_of={}), phased().stages[1])
    broken(dataclasses.replace(phased(), stages=stages), "stage 0: a node without a phase")


def test_phased_with_neighbours_that_disagree_about_a_gradient() -> None:
    name = route("activation").name
    assert name in phased().stages[0].tangents
    for bad in (
        (stage_with(0, tangents=()), phased().stages[1]),
        (phased().stages[0], stage_with(1, sent_grads=())),
    ):
        program = dataclasses.replace(phased(), stages=bad)
        broken(program, "stages 1 and 0 disagree about a gradient", "node: ")


def test_phased_prints_every_node_with_its_phase() -> None:
    text = str(phased())
    assert text.startswith("phased: micro-batch of 2, remat full, full")
    for stage in phased().stages:
        assert f"stage {stage.index}: nodes " in text
        for name, letter in stage.phase_of.items():
            assert re.search(rf"^  {letter} %{name} :", text, re.MULTILINE), name


def test_programs_are_frozen() -> None:
    for program in (*programs(), phased().stages[0], cut().stages[0], captured().inputs[0]):
        field = dataclasses.fields(program)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(program, field, None)
