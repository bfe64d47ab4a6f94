"""Capture: what the graph holds, what comes back, and what is refused instead of captured wrongly.

Where a model can be captured, eager torch on the whole batch is the truth; see `tests.agreement`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from autopipe.errors import AutopipeError, CaptureError, InputError, OptionError
from autopipe.passes.ir import Kind
from tests.agreement import assert_agrees, assert_close, pipelined
from tests.models import Tied
from tests.programs import calls, captured_of, node, user_line

D = 6
BATCH = 7


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Model(nn.Module):
    """Two layers around a function: ``f(model, tanh(first(x)), *rest)``, then `last`."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.f = f

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        return self.f(self, torch.tanh(self.first(x)), *rest, **named)


def batch(size: int = BATCH, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(size, *(shape or (D,))).requires_grad_(grad)


def parameters(model: nn.Module, *args: Any) -> list[str]:
    return [i.target for i in captured_of(model, *args).inputs if i.kind is Kind.PARAMETER]


# ------------------------------------------------------------------------------- the state


def test_a_tied_parameter_is_one_placeholder() -> None:
    model = Tied()
    captured = captured_of(model, torch.randint(0, 19, (4, 5)))
    tied = [
        i
        for i in captured.inputs
        if i.kind is Kind.PARAMETER and model.get_parameter(i.target) is model.head.weight
    ]
    assert len(tied) == 1
    names = [i.name for i in captured.inputs if i.kind is Kind.PARAMETER]
    assert len(names) == len(set(names)) == len(list(model.parameters()))
    placeholder = node(captured.graph_module.graph, tied[0].name)
    assert len(placeholder.users) == 1 + 3 + 1  # the embedding, again in each layer, the head


def test_a_parameter_that_is_not_used_is_no_placeholder() -> None:
    model = Model(lambda s, x: x * 2)
    assert parameters(model, batch()) == ["first.weight", "first.bias"]


def test_buffers_and_constants_are_placeholders() -> None:
    model = Model(lambda s, x: s.last(x) * torch.arange(D) + s.shift)
    model.register_buffer("shift", torch.rand(D))
    captured = captured_of(model, batch())
    kinds = collections.Counter(i.kind for i in captured.inputs)
    assert kinds[Kind.BUFFER] == 1
    assert kinds[Kind.PARAMETER] == 4
    assert all(i.target in captured.constants for i in captured.inputs if i.kind is Kind.CONSTANT)
    assert_agrees(pipelined(model), batch())


def test_names_that_collide_once_dots_are_underscores() -> None:
    model = Model(lambda s, x: s.last(x) * s.a.b + s.a_b)
    model.a = nn.Module()
    model.a.b = nn.Parameter(torch.rand(D))
    model.a_b = nn.Parameter(torch.rand(D))
    assert_agrees(pipelined(model), batch())


# ------------------------------------------------------------------------------- the call's tensors


def test_one_tensor_passed_twice_stays_two_inputs() -> None:
    pipe = pipelined(Model(lambda s, x, y: s.last(x) * y))
    same = batch(grad=True)
    assert_agrees(pipe, same, same)
    assert [i.index for i in pipe.captured.inputs if i.kind is Kind.INPUT] == [0, 1]
    assert_agrees(pipe, batch(grad=True), batch(grad=True))


def test_a_batch_of_one_as_example_fixes_nothing() -> None:
    pipe = pipelined(Model(lambda s, x, y: s.last(x) * y))
    first = pipe(batch(1), batch(1))
    assert first.shape == (1, D)
    for size in (7, 2, 1):
        assert_agrees(pipe, batch(size, grad=True), batch(size))


@pytest.mark.parametrize("in_dims", [(0, None), {"scale": None}])
def test_an_input_without_batch_reaches_every_micro_batch(in_dims: Any) -> None:
    class Scaled(Model):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return self.last(torch.tanh(self.first(x)) * scale)

    pipe = pipelined(Scaled(lambda: None), in_dims=in_dims)
    assert_agrees(pipe, batch(grad=True), torch.randn(D).requires_grad_())


def test_a_tensor_without_dimensions_is_not_batched() -> None:
    pipe = pipelined(Model(lambda s, x, scale: s.last(x) * scale))
    assert_agrees(pipe, batch(), torch.tensor(0.3).requires_grad_())


def test_the_batch_may_be_another_dimension() -> None:
    class Sequence(Model):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.last(torch.tanh(self.first(x)))

    pipe = pipelined(Sequence(lambda: None), in_dims=1)
    found = assert_agrees(pipe, batch(4, BATCH, D, grad=True))
    assert found.shape == (4, BATCH, D)
    assert [o.dim for o in pipe.captured.outputs] == [1]


def test_inputs_that_are_no_tensors_are_part_of_the_graph() -> None:
    model = Model(lambda s, x, power, *, flag: s.last(x) ** power if flag else x)
    pipe = pipelined(model)
    assert_agrees(pipe, batch(), 2, flag=True)
    with pytest.raises(InputError, match="differ in structure"):
        pipe(batch(), 3, flag=True)


def test_strides_of_inputs_are_free() -> None:
    pipe = pipelined(Model(lambda s, x: s.last(x)))
    assert_agrees(pipe, batch())
    assert_agrees(pipe, torch.randn(D, BATCH).t())
    assert_agrees(pipe, torch.randn(1, D).expand(BATCH, D))


Pair = collections.namedtuple("Pair", ["left", "right"])


def test_inputs_in_containers() -> None:
    model = Model(lambda s, x, d, *, more: s.last(x * d["a"]) * d["b"][0] + more.left - more.right)
    found = assert_agrees(
        pipelined(model),
        batch(),
        {"a": batch(), "b": [batch(grad=True)]},
        more=Pair(batch(), batch(grad=True)),
    )
    assert found.shape == (BATCH, D)


@dataclasses.dataclass
class Inputs:
    left: Tensor
    right: Tensor
    factor: int = 3


def test_inputs_in_a_dataclass() -> None:
    """Promise 4: nested dict/tuple/dataclass inputs and outputs."""
    model = Model(lambda s, x, d: s.last(x * d.left) * d.right * d.factor)
    pipe = pipelined(model)
    x, data = batch(), Inputs(batch(), batch())
    assert_close(pipe(x, data), model(x, data))
    other = Inputs(batch(), batch())
    assert_close(pipe(x, other), model(x, other))


def input_names(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    inputs = captured_of(model, *args, **kwargs).inputs
    return [i.name for i in inputs if i.kind is Kind.INPUT]


def test_inputs_are_named_as_the_user_names_them() -> None:
    class Named(nn.Module):
        def forward(self, ids: Tensor, part: Any, *, mask: Tensor, extra: Any) -> Tensor:
            return ids * part["left"] * part["rest"][1] * mask * extra.left

    x = batch()
    names = input_names(Named(), x, {"left": x, "rest": [1.5, x]}, extra=Pair(x, 2), mask=x)
    assert names[:3] == ["ids", "part_left", "part_rest_1"]
    assert sorted(names[3:]) == ["extra_left", "mask"]


def test_names_of_inputs_that_collide_are_made_distinct() -> None:
    class Colliding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, a: Any, a_b: Tensor, p_layer_weight: Tensor, tanh: Tensor) -> Tensor:
            return torch.tanh(self.layer(a["b"])) * a_b * p_layer_weight + tanh

    args = ({"b": batch()}, batch(grad=True), batch(), batch(grad=True))
    names = input_names(Colliding(), *args)
    assert len(set(names)) == 4
    assert_agrees(pipelined(Colliding()), *args)


def test_names_of_inputs_may_be_words_of_the_generated_program() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, kit: Tensor, args: Tensor, run: Tensor, torch: Tensor) -> Tensor:
            return self.layer(kit).tanh() * args + run * torch

    assert_agrees(pipelined(Words()), batch(), batch(), batch(grad=True), batch())


def test_the_example_inputs_are_left_alone() -> None:
    x = batch(grad=True)
    before, version = x.detach().clone(), x._version
    captured_of(Model(lambda s, x: s.last(x)), x)
    assert torch.equal(x.detach(), before)
    assert x._version == version
    assert x.grad is None


# ------------------------------------------------------------------------------- results


@dataclasses.dataclass
class Inner:
    first: Any
    second: Any = None


@dataclasses.dataclass
class Outer:
    inner: Inner
    more: dict[str, Any]
    number: float = 1.5


RESULTS: dict[str, Callable[..., Any]] = {
    "tensor": lambda s, x: s.last(x),
    "tuple of one": lambda s, x: (s.last(x),),
    "list": lambda s, x: [s.last(x), x],
    "dict": lambda s, x: {"b": s.last(x), "a": {"c": (x, None, "text", 3)}},
    "ordered dict": lambda s, x: collections.OrderedDict(b=s.last(x), a=x),
    "named tuple": lambda s, x: Pair(s.last(x), {"x": [x]}),
    "the same value twice": lambda s, x: (x, s.last(x), x),
    "views of one value": lambda s, x: (x, x.view(-1), x[:, 0], s.last(x).t()),
    "a parameter": lambda s, x: (s.last(x), s.last.weight),
    "something of a parameter": lambda s, x: (s.last(x), s.last.weight * 2),
    "integers and booleans": lambda s, x: (s.last(x), x.argmax(-1), x > 0),
    "detached": lambda s, x: (s.last(x), x.detach()),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_have_the_models_structure(name: str) -> None:
    assert_agrees(pipelined(Model(RESULTS[name])), batch(grad=True))


def test_results_that_are_inputs() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.layers(x), x, y, x.view(-1)

    pipe = pipelined(Returns())
    x, y = batch(grad=True), batch()
    assert_agrees(pipe, x, y)
    found = pipe(x, y)
    assert found[1] is x
    assert found[2] is y


def test_results_in_nested_dataclasses() -> None:
    model = Model(lambda s, x: Outer(Inner(s.last(x)), {"x": [x]}))
    found = assert_agrees(pipelined(model), batch(grad=True))
    assert isinstance(found, Outer)
    assert isinstance(found.inner, Inner)
    assert found.inner.second is None
    assert found.number == 1.5


def test_results_of_transformers() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    model = Model(lambda s, x: BaseModelOutput(last_hidden_state=s.last(x)))
    found = assert_agrees(pipelined(model), batch(grad=True))
    assert isinstance(found, BaseModelOutput)
    assert found.last_hidden_state is found[0]


class Unknown:
    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_an_unknown_object_among_the_results_is_refused() -> None:
    with pytest.raises(CaptureError, match="neither a tensor nor a known container") as caught:
        captured_of(Model(lambda s, x: {"x": Unknown(x)}), batch())
    assert caught.value.found == f"{__name__}.Unknown"
    assert "register_pytree_node" in str(caught.value)


def tiny_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8)
    return GPT2LMHeadModel(config).eval()


def test_a_cache_that_was_not_asked_for_is_left_out_with_a_note() -> None:
    model, ids = tiny_gpt2(), torch.randint(0, 16, (4, 8))
    assert model(ids).past_key_values is not None
    pipe = pipelined(model)
    with torch.no_grad():
        result, expected = pipe(ids), model(ids)
    assert result.past_key_values is None
    assert_close(result.logits, expected.logits)
    assert any("DynamicCache" in note for note in pipe.captured.notes)
    assert "DynamicCache" in pipe.explain()


def test_a_cache_that_was_asked_for_is_refused() -> None:
    with pytest.raises(CaptureError, match="key/value cache") as caught:
        captured_of(tiny_gpt2(), torch.randint(0, 16, (4, 8)), use_cache=True)
    assert "DynamicCache" in str(caught.value)
    assert "use_cache" in str(caught.value)


# ------------------------------------------------------------------------------- gradients


def no_grad_region(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.sin()
        shift = s.last(scale)
    return s.last(x * scale) + shift


def no_grad_that_writes(s: Any, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    with torch.no_grad():
        total.add_(x)
    return s.last(x * total)


def grad_within_no_grad(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.sin()
        with torch.enable_grad():
            shift = s.last(x)
    return s.last(x * scale) + shift


@torch.no_grad()
def decorated(x: Tensor) -> Tensor:
    return x.cos() * 2


def straight_through(s: Any, x: Tensor) -> Tensor:
    return s.last(x + (x.round() - x).detach())


def detached_in_place(s: Any, x: Tensor) -> Tensor:
    scale = x.sin()
    scale.detach_()
    return s.last(x * scale)


def from_here_on(s: Any, x: Tensor) -> Tensor:
    return s.last(x.detach().requires_grad_())


REGIONS: dict[str, Callable[..., Any]] = {
    "no_grad": no_grad_region,
    "no_grad that writes": no_grad_that_writes,
    "enable_grad within no_grad": grad_within_no_grad,
    "decorated function": lambda s, x: s.last(x * decorated(x)),
    "straight-through by detach": straight_through,
    "detach_": detached_in_place,
    "requires_grad_ of a detached value": from_here_on,
    "checkpoint": lambda s, x: checkpoint.checkpoint(s.last, x.sin(), use_reentrant=False),
}


@pytest.mark.parametrize("name", REGIONS)
def test_regions_without_gradients_have_eagers_gradients(name: str) -> None:
    assert_agrees(pipelined(Model(REGIONS[name])), batch(grad=True))


def test_regions_are_inlined() -> None:
    graph = captured_of(Model(grad_within_no_grad), batch()).graph_module.graph
    assert {type(n.target) for n in calls(graph)} == {type(torch.ops.aten.sin.default)}
    assert not [n for n in graph.nodes if n.op == "get_attr"]


def in_inference_mode(s: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        shift = x.sin()
    return s.last(x) + shift


def test_inference_mode_within_the_model_is_refused_or_right() -> None:
    """Export keeps nothing of the region, and the gradient would flow through it."""
    pipe = pipelined(Model(in_inference_mode))
    x = batch(grad=True)
    try:
        pipe(x)
    except AutopipeError:
        return
    assert_agrees(pipe, x)


def uses_hook(s: Any, x: Tensor) -> Tensor:
    x.register_hook(lambda gradient: gradient * 2)  # the line of the hook
    return s.last(x)


def test_a_tensor_hook_is_refused() -> None:
    with pytest.raises(CaptureError, match="a hook on a tensor") as caught:
        captured_of(Model(uses_hook), batch())
    assert caught.value.source == user_line(uses_hook, "# the line " + "of the hook")


@pytest.mark.parametrize("where", ["first", ""])
def test_a_module_backward_hook_is_refused(where: str) -> None:
    model = Model(lambda s, x: s.last(x))
    model.get_submodule(where).register_full_backward_hook(lambda m, i, o: (i[0] * 2,))
    with pytest.raises(CaptureError):
        captured_of(model, batch())


def test_after_a_refusal_torch_is_as_before() -> None:
    before = torch.autograd.Function.__dict__.get("apply"), Tensor.register_hook
    with pytest.raises(CaptureError):
        captured_of(Model(uses_hook), batch())
    assert (torch.autograd.Function.__dict__.get("apply"), Tensor.register_hook) == before


def test_forward_hooks_and_hooks_on_parameters_work() -> None:
    model = Model(lambda s, x: s.last(x))
    model.first.register_forward_hook(lambda m, args, result: result * 2)
    model.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    seen = []
    pipe = pipelined(model)
    assert_agrees(pipe, batch(grad=True))
    model.last.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    model.zero_grad()
    pipe(batch()).sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], model.last.weight.grad)


def test_parametrizations_are_captured() -> None:
    model = Model(lambda s, x: s.last(x))
    nn.utils.parametrizations.weight_norm(model.last)
    assert_agrees(pipelined(model), batch(grad=True))


# ------------------------------------------------------------------------------- autocast


def cast_off(s: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return s.last(x.float())


def cast_on(s: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = s.last(x)
    return y * y


@pytest.mark.parametrize("inner", [cast_off, cast_on])
@pytest.mark.parametrize("outer", [False, True])
def test_autocast_regions_within_the_model(inner: Callable[..., Any], outer: bool) -> None:
    """One micro-batch, so that not a bit may differ."""
    model = Model(inner).float()
    pipe = pipelined(model, chunks=1)
    x = torch.randn(BATCH, D, dtype=torch.float32)

    def step(module: nn.Module) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
            result = module(x)
        result.float().sum().backward()
        return result.detach(), [p.grad.clone() for p in model.parameters()]

    (found, gradients), (expected, eager) = step(pipe), step(model)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, eager, strict=True))


def test_autocast_around_the_call_may_change_from_call_to_call() -> None:
    model = Model(lambda s, x: s.last(x)).float()
    pipe = pipelined(model, chunks=1)
    x = torch.randn(BATCH, D, dtype=torch.float32)
    for enabled in (False, True, False):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found, expected = pipe(x), model(x)
        assert found.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert torch.equal(found, expected)


# ------------------------------------------------------------------------------- refused


def branches(s: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:  # the line of the branch
        x = x * 2
    return s.last(x)


def test_control_flow_on_data_is_refused() -> None:
    with pytest.raises(CaptureError, match="control flow that depends on the values") as caught:
        captured_of(Model(branches), batch())
    assert caught.value.source == user_line(branches, "# the line " + "of the branch")
    assert "torch.where" in str(caught.value)


def selects(s: Any, x: Tensor) -> Tensor:
    return s.last(x)[x[:, 0] > 0]  # the line of the selection


def test_a_size_that_depends_on_data_is_refused() -> None:
    with pytest.raises(AutopipeError) as caught:
        pipelined(Model(selects))(batch())
    # torch keeps the frames of functions called `forward` only: the caller of `selects`
    assert __file__ in str(caught.value.source)
    assert "torch.where" in str(caught.value)


def test_a_batch_size_fixed_by_the_model_is_refused() -> None:
    model = Model(lambda s, x: s.last(x.view(BATCH, 2, 3).reshape(BATCH, D)))
    with pytest.raises(CaptureError, match="fixes the size of its batch dimension") as caught:
        captured_of(model, batch())
    assert caught.value.node == "x"
    assert caught.value.found == f"always {BATCH}"
    assert "in_dims" in str(caught.value)


def test_a_model_that_fails_is_refused_with_its_own_error() -> None:
    def fails(s: Any, x: Tensor) -> Tensor:
        return s.last(x[:, :3])  # the line that fails

    with pytest.raises(CaptureError, match="cannot capture") as caught:
        captured_of(Model(fails), batch())
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.source == user_line(fails, "# the line " + "that fails")


def derives(s: Any, x: Tensor) -> Tensor:
    x = x.tanh()
    (g,) = torch.autograd.grad(s.last(x).sum(), x, create_graph=True)  # the line that derives
    return g.square().sum()


def test_gradients_taken_inside_the_model_are_refused() -> None:
    with pytest.raises(CaptureError, match="takes gradients inside its forward") as caught:
        captured_of(Model(derives), batch(grad=True))
    assert caught.value.source == user_line(derives, "# the line " + "that derives")
    x = torch.ones(1, requires_grad=True)
    assert torch.autograd.grad((2 * x).sum(), x)[0] == 2, "torch is as before"


def test_vmap_inside_the_model_is_refused() -> None:
    model = Model(lambda s, x: torch.vmap(lambda row: s.last(row).sin())(x))
    with pytest.raises(CaptureError, match="function transform inside the model") as caught:
        captured_of(model, batch())
    assert __file__ in str(caught.value.source)


def test_an_operator_with_graphs_of_its_own_is_refused() -> None:
    def conditional(s: Any, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y + 1, (x,))

    with pytest.raises(CaptureError, match=r"graphs of its own|cannot capture"):
        captured_of(Model(conditional), batch())


def test_a_call_without_batch_is_refused() -> None:
    pipe = pipelined(Model(lambda s, x: s.last(x)), in_dims=None)
    with pytest.raises(InputError, match="no input has a batch dimension"):
        pipe(batch())
    with pytest.raises(InputError, match="without samples"):
        pipelined(Model(lambda s, x: s.last(x)))(batch(0))


def test_inputs_that_differ_in_their_number_of_samples_are_named() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, pair: list[Tensor], *more: Tensor, mask: Tensor) -> Tensor:
            return x + pair[0] + pair[1] + more[0] + mask

    with pytest.raises(InputError, match="differ in their number of samples") as raised:
        pipelined(Sum())(batch(4), [batch(4), batch(1)], batch(4), mask=torch.randn(D))
    assert raised.value.found == (
        f"x: 4 in dimension 0 of (4, {D}); pair: 4 in dimension 0 of (4, {D}); "
        f"pair: 1 in dimension 0 of (1, {D}); args[2]: 4 in dimension 0 of (4, {D}); "
        f"mask: {D} in dimension 0 of ({D},)"
    )


# ------------------------------------------------------------------------------- other front doors


def test_graph_modules_and_exported_programs_are_models_too() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    x = batch()
    traced = fx.symbolic_trace(model)
    assert_agrees(pipelined(traced), x)
    shapes = {"input": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    pipe = pipelined(program)
    assert_close(pipe(x).detach(), model(x).detach())
    assert_close(pipe(batch(3)).detach().new_zeros(3, D), torch.zeros(3, D))


def test_an_exported_program_with_a_fixed_batch_is_refused() -> None:
    program = torch.export.export(nn.Linear(D, D), (batch(),))
    with pytest.raises(AutopipeError) as caught:
        pipelined(program, devices=1)(batch())
    assert "dynamic batch dimension" in str(caught.value)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(OptionError, match="not a module"):
        pipelined(F.relu)  # type: ignore[arg-type]


def test_capture_works_on_meta() -> None:
    with torch.device("meta"):
        model = Model(lambda s, x: s.last(x))
    captured = captured_of(model, batch())
    assert [str(s) for s in captured.outputs[0].spec.shape] == ["B", str(D)]
    assert all(p.is_meta for p in model.parameters())
    leaves, _ = pytree.tree_flatten([o.spec.dtype for o in captured.outputs])
    assert leaves == [torch.float64]
