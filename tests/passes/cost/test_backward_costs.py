"""Backwards against torch: its counter on the model itself, and what its autograd saves.

Covers cost/grad_flow.py, cost/call_cache.py, cost/meta_run.py and cost/op_counter.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from autopipe.call_signature import flatten
from autopipe.passes.capture.model import capture
from autopipe.passes.capture.request import CaptureRequest
from autopipe.passes.cost import call_cache as distinct
from autopipe.passes.cost.meta_run import run_forward
from autopipe.passes.cost.node_costs import annotate
from autopipe.passes.cost.stage_cost import sum_costs
from autopipe.passes.ir.captured import Annotated, NodeCost
from autopipe.passes.ir.values import B, at_batch
from benchmarks.transformer_l import TransformerL, on_meta
from tests.support.models import MODELS
from tests.support.programs import calls, captured_of, known, tensors
from tests.support.zoo import ZOO

pytestmark = pytest.mark.few(2)

aten = torch.ops.aten
BATCHES = (2, 5, 7)


def sum_of(annotated: Annotated, fact: str) -> sympy.Expr:
    return sum_costs(annotated.costs.values(), fact)


def cost_of(annotated: Annotated, target: Any) -> NodeCost:
    (found,) = calls(annotated.captured.graph_module.graph, target)
    return annotated.costs[found.name]


def annotated_of(model: nn.Module, *args: Any, **kwargs: Any) -> Annotated:
    return annotate(captured_of(model, *args, **kwargs))


def loss_of(result: Any) -> Tensor:
    """The model's own loss, or the sum of all that has a gradient."""
    if getattr(result, "loss", None) is not None:
        loss: Tensor = result.loss
        return loss
    fields = vars(result) if hasattr(result, "sample") else result
    leaves = [x for x in pytree.tree_leaves(fields) if isinstance(x, Tensor) and x.requires_grad]
    return torch.stack([x.sum() for x in leaves]).sum()


def counted(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the model's own backward, as torch counts them (attention: see test_cost)."""
    model = copy.deepcopy(model)
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_of(model(*args, **kwargs))
        with FlopCounterMode(display=False) as counter:
            loss.backward()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("name", MODELS)
def test_backward_flops_of_models_are_torchs(name: str) -> None:
    model, inputs, annotated = known(name)
    flops = sum_of(annotated, "backward_flops")
    assert flops.free_symbols == {B}
    for size in BATCHES:
        args, kwargs = inputs(size)
        assert at_batch(flops, size) == counted(model, *args, **kwargs)


@pytest.mark.parametrize("name", ["GPT-2", "UNet2D", "T5", "Swin", "ResNet"])
def test_backward_flops_of_architectures_are_torchs(name: str) -> None:
    model, kwargs = ZOO[name].build(False)
    leaves, spec = flatten((), kwargs)
    request = CaptureRequest(model, leaves, spec, [0] * len(leaves), whole=True)
    annotated = annotate(capture(request))
    forward, backward = (sum_of(annotated, f"{way}_flops") for way in ("forward", "backward"))
    for size in (2, 3, 5):
        small = {n: x[:size] for n, x in kwargs.items()}
        own = copy.deepcopy(model)
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as there:
                loss = ZOO[name].loss(own(**small))
            with FlopCounterMode(display=False) as back:
                loss.backward()
        found = at_batch(forward, size), at_batch(backward, size)
        assert found == (there.get_total_flops(), back.get_total_flops())


def test_backward_flops_of_transformer_l() -> None:
    model = TransformerL(2, width=16, inner=64, heads=2, vocabulary=50)
    ids = torch.randint(0, 50, (4, 6))
    annotated = annotated_of(model, ids, ids)
    flops = sum_of(annotated, "backward_flops")
    for size in BATCHES:
        ids = torch.randint(0, 50, (size, 6))
        own = copy.deepcopy(model)
        with sdpa_kernel(SDPBackend.MATH):
            loss = own(ids, ids)
            with FlopCounterMode(display=False) as counter:
                loss.backward()
        assert at_batch(flops, size) == counter.get_total_flops()
    # by hand: two products for each product, nothing owed to the tokens
    layer = 4 * 16 * 16 + 2 * 16 * 64 + 2 * 6 * 16
    assert flops == 2 * 2 * 6 * (2 * layer + 50 * 16) * B


def test_the_first_layer_owes_its_input_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    product = 2 * 6 * 10 * B
    assert sum_of(annotated_of(model, torch.randn(4, 6)), "backward_flops") == (
        product + 2 * (2 * 10 * 3 * B)
    )
    x = torch.randn(4, 6, requires_grad=True)
    assert sum_of(annotated_of(model, x), "backward_flops") == 2 * product + 2 * (2 * 10 * 3 * B)


class Tower(nn.Module):
    """A part that is frozen, an adapter that is not, and another part that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.adapter, self.above = (nn.Linear(6, 6) for _ in range(3))
        self.below.requires_grad_(False)
        self.above.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(torch.tanh(self.adapter(torch.tanh(self.below(x)))))


def test_a_frozen_part_has_no_backward() -> None:
    annotated = annotated_of(Tower(), torch.randn(4, 6))
    below, adapter, above = calls(annotated.captured.graph_module.graph, aten.linear.default)
    flops = [annotated.costs[n.name].backward_flops for n in (below, adapter, above)]
    product = 2 * 6 * 6 * B  # adapter: its weight's gradient; above: its input's
    assert flops == [0, product, product]
    tanh, _ = calls(annotated.captured.graph_module.graph, aten.tanh.default)
    assert annotated.costs[tanh.name].backward_bytes == 0
    assert annotated.costs[tanh.name].saved_bytes == 4 * 6 * B  # the adapter's input
    for size in BATCHES:
        own = counted(Tower(), torch.randn(size, 6))
        assert at_batch(sum_of(annotated, "backward_flops"), size) == own


class Unused(nn.Module):
    """Something beside the loss that no gradient comes for; and a part that is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.a(x)
        return {"loss": self.b(y).square().mean(), "aside": self.c(y.detach())}


def test_only_the_way_to_the_loss_has_a_backward() -> None:
    model = Unused()
    annotated = annotated_of(model, torch.randn(4, 6))
    linears = calls(annotated.captured.graph_module.graph, aten.linear.default)
    found = {str(n.args[1]): annotated.costs[n.name] for n in linears}
    product = 2 * 6 * 6 * B
    assert found["p_a_weight"].backward_flops == product
    assert found["p_b_weight"].backward_flops == 2 * product
    assert found["p_c_weight"].backward_flops == 0
    for size in BATCHES:
        loss = model(torch.randn(size, 6))["loss"]
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        assert at_batch(sum_of(annotated, "backward_flops"), size) == counter.get_total_flops()


class Writes(nn.Module):
    """What is written in place after it was made is differentiated through the write."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :3] = self.a(x)[:, :3]
        y.mul_(2.0)
        return self.b(y)


def test_gradients_go_through_writes_in_place() -> None:
    annotated = annotated_of(Writes(), torch.randn(4, 6))
    for size in BATCHES:
        own = counted(Writes(), torch.randn(size, 6))
        assert at_batch(sum_of(annotated, "backward_flops"), size) == own


def test_one_value_twice_is_another_call_than_two_values() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y, z = x + self.w[0], x * self.w[1]
            return (y.unsqueeze(1) * y.unsqueeze(1)) + (y.unsqueeze(1) * z.unsqueeze(1))

    model = Products()
    annotated = annotated_of(model, torch.randn(4, 4))
    check_saved(annotated, model, ((torch.randn(7, 4),), {}), 7)


def test_flops_may_be_cubic_in_the_batch() -> None:
    class Powers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.w(x)
            similar = y @ y.t()
            return similar @ similar

    model = Powers()
    annotated = annotate(captured_of(model, torch.randn(4, 6), whole=True))
    flops = sum_of(annotated, "backward_flops")
    assert sympy.degree(flops, B) == 3
    for size in (*BATCHES, 11):
        assert at_batch(flops, size) == counted(model, torch.randn(size, 6))


# ------------------------------------------------------------------------------- bytes


def check_saved(annotated: Annotated, model: nn.Module, call: Any, size: int) -> None:
    """Memory that autograd keeps of a run of the captured graph, each piece once, but its inputs.

    (The captured graph, not the model: T5 and GPT-2 make their masks another way while tracing.)
    """
    values = tensors(annotated.captured, model, call)
    given = {x.untyped_storage().data_ptr() for x in values}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        result = annotated.captured.graph_module(*values)
    nbytes = sum(x.untyped_storage().nbytes() for s, x in kept.items() if s not in given)
    assert at_batch(sum_of(annotated, "saved_bytes"), size) == nbytes
    assert result


@pytest.mark.parametrize("name", MODELS)
def test_saved_bytes_are_autograds(name: str) -> None:
    model, inputs, annotated = known(name)
    for size in BATCHES:
        check_saved(annotated, model, inputs(size), size)


def test_bytes_of_a_linear_layers_backward() -> None:
    """A product for the weight, one for the input, a sum for the bias: reads and writes."""
    x = torch.randn(4, 6, requires_grad=True)
    cost = cost_of(annotated_of(nn.Linear(6, 10), x), aten.linear.default)
    tangent, weight, given = 10 * B, sympy.Integer(60), 6 * B
    moved = (tangent + weight + given) + (tangent + given + weight) + (tangent + 10)
    assert sympy.expand(cost.backward_bytes - 4 * moved) == 0


def test_gradients_of_a_value_that_is_used_thrice_are_summed() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.w(x)
            return y + 1, y + 2, y + 3

    cost = cost_of(annotated_of(Thrice(), torch.randn(4, 6)), aten.linear.default)
    once = cost_of(annotated_of(nn.Linear(6, 6), torch.randn(4, 6)), aten.linear.default)
    assert sympy.expand(cost.backward_bytes - once.backward_bytes) == 2 * 3 * 4 * 6 * B


def test_memory_of_attention_is_a_fused_kernels() -> None:
    """Plain kernels would save the products of all positions with all, a fused one does not."""
    q, k, v = (torch.randn(2, 3, 64, 8, requires_grad=True) for _ in range(3))

    class Attends(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    cost = cost_of(annotated_of(Attends(), q, k, v), aten.scaled_dot_product_attention.default)
    result, logarithms = 3 * 64 * 8, 3 * 64
    assert cost.saved_bytes == 4 * (result + logarithms) * B
    assert cost.backward_flops == 2 * cost.forward_flops


def test_a_fused_backward_on_a_gpu_repeats_one_product() -> None:
    """torch's formula for it against ours: what the scores cost comes on top."""
    shape, other = torch.Size((2, 3, 64, 8)), torch.Size((2, 3, 48, 8))
    formula = flop_registry[aten._scaled_dot_product_flash_attention_backward]
    there = formula(shape, shape, other, other)

    class Attends(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    q, k, v = (torch.randn(s, requires_grad=True) for s in (shape, other, other))
    cost = cost_of(annotated_of(Attends(), q, k, v), aten.scaled_dot_product_attention.default)
    assert at_batch(cost.backward_flops, 2) + 2 * (2 * 3) * 64 * 48 * 8 == there


@pytest.mark.parametrize("depths", [(3, 9)])
def test_deeper_models_run_no_more_calls(
    depths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is run without memory is each distinct call, however often the model makes it."""
    counts = []
    for depth in depths:
        model, args = on_meta(depth, 4)
        captured = captured_of(model, *args)
        ran: list[str] = []

        def counting(node: Any, *rest: Any, seen: list[str] = ran, **more: Any) -> Any:
            seen.append(node.name)
            return run_forward(node, *rest, **more)

        monkeypatch.setattr(distinct, "run_forward", counting)
        annotate(captured)
        counts.append(len(ran))
    assert counts[0] == counts[1] > 0


def test_half_precision_and_kinds_of_work() -> None:
    model = nn.Sequential(nn.Conv1d(3, 5, 3), nn.ReLU(), nn.Linear(15, 4)).half()
    annotated = annotated_of(model, torch.randn(4, 3, 17, dtype=torch.half))
    kinds = {str(n.target): annotated.costs[n.name] for n in calls(_graph(annotated))}
    found = {t.split(".")[1]: (c.kind, c.precision) for t, c in kinds.items()}
    assert found["conv1d"] == ("convolution", "half")
    assert found["relu"] == ("memory", "half")
    assert found["linear"] == ("matmul", "half")


def _graph(annotated: Annotated) -> torch.fx.Graph:
    return annotated.captured.graph_module.graph


@pytest.mark.full
def test_every_cost_of_the_models_is_exact() -> None:
    for name in MODELS:
        _, _, annotated = known(name)
        assert [n for n, c in annotated.costs.items() if not c.exact] == []


# ------------------------------------------------------------------------------- surroundings


class Doubling(torch.autograd.Function):
    """A backward that makes a tensor on the CPU, as users' backwards do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.tensor([2.0])

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * torch.tensor([2.0])


class Refusing(torch.autograd.Function):
    """A backward that looks at values, which tensors without memory do not have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Tensor:
        if tangent.sum() > 0:
            return tangent * 2
        raise KeyError("nothing to double")


class Custom(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function.apply(self.layer(x))
        return result.tanh()


def test_custom_functions_are_run_where_their_constants_are() -> None:
    annotated = annotate(captured_of(Custom(Doubling), torch.randn(4, 6), whole=True))
    assert all(c.exact for c in annotated.costs.values())
    (linear,) = calls(_graph(annotated), aten.linear.default)
    assert annotated.costs[linear.name].backward_flops == 2 * 6 * 6 * B


def test_what_cannot_be_run_without_memory_is_estimated() -> None:
    """Its gradients flow on, and it says of itself that it is no exact cost."""
    annotated = annotate(captured_of(Custom(Refusing), torch.randn(4, 6), whole=True))
    estimated = [c for c in annotated.costs.values() if not c.exact]
    assert len(estimated) == 1
    assert estimated[0].backward_bytes == 2 * estimated[0].forward_bytes != 0
    (linear,) = calls(_graph(annotated), aten.linear.default)
    assert annotated.costs[linear.name].backward_flops == 2 * 6 * 6 * B


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_costs_are_the_same_where_gradients_are_off(mode: Any) -> None:
    captured = captured_of(MODELS["fan_out"].make()[0], torch.randn(4, 16))
    expected = annotate(captured).costs
    with mode():
        assert annotate(captured).costs == expected


def test_no_random_number_is_drawn() -> None:
    _, _, annotated = known("gpt2_dropout")
    before = torch.get_rng_state()
    annotate(annotated.captured)
    assert torch.equal(torch.get_rng_state(), before)
