"""Capture: what a model returns, which gradients it has, and the autocast regions in it.

Covers capture/flat_module.py (the structure of results) and capture/exporting.py (what is refused).
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import pathlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from autopipe.errors import CaptureError
from tests.support.agreement import assert_agrees, assert_close, pipelined
from tests.support.capturing import BATCH, D, Model, Pair, batch
from tests.support.programs import calls, captured_of, user_line

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("double", "traces_once")]


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


class UnknownError(Exception):
    """Its arguments are no attributes."""


def test_an_unknown_object_among_the_results_is_refused() -> None:
    with pytest.raises(CaptureError, match="neither a tensor nor a known container") as caught:
        captured_of(Model(lambda s, x: {"x": UnknownError(x)}), batch())
    assert caught.value.found == f"{__name__}.UnknownError"
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


def test_inference_mode_within_the_model_is_refused() -> None:
    """Export keeps nothing of the region, and the gradient would flow through it."""
    with pytest.raises(CaptureError, match="inference mode inside the model") as caught:
        pipelined(Model(in_inference_mode))(batch(grad=True))
    assert caught.value.source == user_line(in_inference_mode, "with torch.inference" + "_mode()")


@torch.inference_mode()
def infers(x: Tensor) -> Tensor:
    return x.sin()


def entered_by_a_stack(x: Tensor) -> Tensor:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        return x.sin()


@pytest.mark.parametrize("shift", [infers, entered_by_a_stack])
def test_inference_mode_that_torch_enters_is_refused(shift: Callable[[Tensor], Tensor]) -> None:
    """Not the user's line enters it, but a decorator's, or that of an `ExitStack`."""
    with pytest.raises(CaptureError, match="inference mode inside the model"):
        pipelined(Model(lambda s, x: s.last(x) + shift(x)))(batch(grad=True))


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
    before = [*map(dict, map(vars, torch.autograd.Function.__mro__)), Tensor.register_hook]
    with pytest.raises(CaptureError):
        captured_of(Model(uses_hook), batch())
    assert [*map(dict, map(vars, torch.autograd.Function.__mro__)), Tensor.register_hook] == before


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


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize("value", [Colour.RED, range(3), slice(1, 2), pathlib.PurePath("a")])
def test_plain_values_are_results(value: Any) -> None:
    pipe = pipelined(Model(lambda s, x: (s.last(x), value)))
    assert pipe(batch())[1] == value


def test_a_text_that_tells_the_size_of_the_batch_is_refused() -> None:
    """The name of a symbol stood in the place of the number."""
    pipe = pipelined(Model(lambda s, x: (s.last(x), f"{tuple(x.shape)}")))
    with pytest.raises(CaptureError, match="a text that tells the size"):
        pipe(batch())


def test_a_text_about_other_sizes_is_a_result() -> None:
    pipe = pipelined(Model(lambda s, x: (s.last(x), f"s1 {x.shape[1]}")))
    assert pipe(batch())[1] == f"s1 {D}"
