"""Costs against torch's own counter on the eager model, and against figures worked out by hand.

What `FlopCounterMode` counts is what is dispatched. On the CPU that leaves out fused attention: it
has no formula for `_scaled_dot_product_flash_attention_for_cpu` and counts 0 for it
(`test_torch_counts_no_flops_for_fused_attention_on_the_cpu`). The eager models are therefore
counted with attention's plain kernels, of which it counts both products, as on a GPU.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autopipe.passes.cost.node_costs import annotate
from autopipe.passes.ir.captured import Annotated, NodeCost
from autopipe.passes.ir.values import B, at_batch
from tests.support.models import MODELS
from tests.support.programs import calls, captured_of, known

pytestmark = pytest.mark.few(3)

aten = torch.ops.aten
BATCHES = (2, 5, 7)


def total(annotated: Annotated) -> sympy.Expr:
    return sympy.Add(*(c.forward_flops for c in annotated.costs.values()))


def counted(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the model's own forward, as torch counts them."""
    model = copy.deepcopy(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops()


def cost_of(annotated: Annotated, target: Any) -> NodeCost:
    (found,) = calls(annotated.captured.graph_module.graph, target)
    return annotated.costs[found.name]


def annotated_of(model: nn.Module, *args: Any, **kwargs: Any) -> Annotated:
    return annotate(captured_of(model, *args, **kwargs))


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, f: Any) -> None:
        super().__init__()
        self.f = f

    def forward(self, *args: Tensor) -> Any:
        return self.f(*args)


# ------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("name", MODELS)
def test_flops_of_models_are_torchs(name: str) -> None:
    model, inputs, annotated = known(name)
    flops = total(annotated)
    assert flops.free_symbols == {B}
    for size in BATCHES:
        args, kwargs = inputs(size)
        assert at_batch(flops, size) == counted(model, *args, **kwargs)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


ATTENDED = [(2, 5, 8), (2, 7, 8), (2, 7, 3)]  # heads, positions, channels of q, k, v


LAYERS: dict[str, tuple[nn.Module, list[tuple[int, ...]]]] = {
    "linear stack": (
        nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3, bias=False)),
        [(6,)],
    ),
    "linear over positions": (nn.Linear(6, 10), [(4, 6)]),
    "conv1d": (nn.Conv1d(3, 5, 3, stride=2), [(3, 17)]),
    "conv2d": (nn.Conv2d(4, 8, 3, padding=1), [(4, 9, 11)]),
    "grouped conv2d": (nn.Conv2d(4, 8, 3, stride=2, groups=2), [(4, 9, 11)]),
    "transposed conv2d": (nn.ConvTranspose2d(4, 6, 3, stride=2), [(4, 5, 5)]),
    "bmm": (Call(torch.bmm), [(3, 4), (4, 5)]),
    "matmul": (Call(torch.matmul), [(2, 3, 4), (2, 4, 5)]),
    "einsum": (Call(lambda x, y: torch.einsum("bij,bkj->bik", x, y)), [(3, 4), (5, 4)]),
    "attention": (Call(attention), ATTENDED),
    "causal attention": (Call(causal), ATTENDED),
    "multihead attention": (nn.MultiheadAttention(8, 2, batch_first=True), [(5, 8)] * 3),
    "element-wise": (Call(lambda x, y: (x * y).tanh().sum(1)), [(4,), (4,)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_flops_of_layers_are_torchs(name: str) -> None:
    model, shapes = LAYERS[name]

    def inputs(size: int) -> list[Tensor]:
        return [torch.randn(size, *shape) for shape in shapes]

    flops = total(annotated_of(model, *inputs(4)))
    for size in BATCHES:
        assert at_batch(flops, size) == counted(model, *inputs(size))


def test_flops_of_layers_by_hand() -> None:
    """A product adds as often as it multiplies."""
    linear = annotated_of(nn.Linear(6, 10), torch.randn(4, 3, 6))
    assert total(linear) == 2 * 3 * 6 * 10 * B
    conv = annotated_of(nn.Conv2d(4, 8, 3), torch.randn(4, 4, 9, 11))
    assert total(conv) == 2 * (7 * 9) * 8 * (4 * 3 * 3) * B
    heads, here, there, inner, outer = 2, 5, 7, 8, 3
    attended = annotated_of(Call(attention), *[torch.randn(4, *shape) for shape in ATTENDED])
    assert total(attended) == 2 * heads * here * there * (inner + outer) * B


def test_flops_may_be_quadratic_in_the_batch() -> None:
    model = Call(lambda x: (x @ x.t()).relu())
    captured = captured_of(model, torch.randn(4, 6), whole=True)  # one micro-batch: they may mix
    flops = total(annotate(captured))
    for size in BATCHES:
        assert at_batch(flops, size) == counted(model, torch.randn(size, 6)) == 2 * 6 * size**2


def test_torch_counts_no_flops_for_fused_attention_on_the_cpu() -> None:
    """The one known difference from what torch counts on this device; we count the products."""
    arguments = [torch.randn(2, *shape) for shape in ATTENDED]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), FlopCounterMode(display=False) as counter:
        attention(*arguments[:2], arguments[1])
    assert counter.get_total_flops() == 0
    flops = total(annotated_of(Call(attention), *arguments[:2], arguments[1]))
    assert at_batch(flops, 2) == counted(Call(attention), *arguments[:2], arguments[1]) > 0


def test_identical_calls_cost_the_same() -> None:
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)])
    annotated = annotated_of(model, torch.randn(4, 6))
    costs = [annotated.costs[n.name] for n in calls(annotated.captured.graph_module.graph)]
    assert len(costs) == 5
    assert len(set(costs[1:-1])) == 1
    assert 2 * costs[0].backward_flops == costs[1].backward_flops  # nothing is owed to the input
    assert costs[-1].saved_bytes == 0  # nobody needs the result again


def test_annotating_changes_nothing() -> None:
    captured = captured_of(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), torch.randn(4, 6))
    before = str(captured)
    first, second = annotate(captured), annotate(captured)
    assert str(captured) == before
    assert first.costs == second.costs


# ------------------------------------------------------------------------------- bytes


def test_bytes_of_a_linear_layer() -> None:
    annotated = annotated_of(nn.Linear(6, 10), torch.randn(4, 3, 6))
    cost = cost_of(annotated, aten.linear.default)
    assert cost.activation_bytes == 4 * 3 * 10 * B
    assert sympy.expand(cost.forward_bytes - 4 * (3 * 6 * B + 6 * 10 + 10 + 3 * 10 * B)) == 0


def test_bytes_depend_on_the_element_type() -> None:
    model = Call(lambda x: (x.half() * 2, x > 0, x.argmax(-1)))
    annotated = annotated_of(model, torch.randn(4, 6))
    assert cost_of(annotated, aten.mul.Tensor).activation_bytes == 2 * 6 * B
    assert cost_of(annotated, aten.gt.Scalar).activation_bytes == 6 * B
    assert cost_of(annotated, aten.argmax.default).activation_bytes == 8 * B


def test_views_cost_nothing() -> None:
    model = Call(lambda x: x.view(-1, 2, 3).transpose(1, 2)[:, 0].unsqueeze(1).expand(-1, 4, -1))
    annotated = annotated_of(model, torch.randn(4, 6))
    assert len(annotated.costs) >= 5
    for cost in annotated.costs.values():
        assert cost == NodeCost()


def test_calls_in_place_move_bytes_and_make_none() -> None:
    model = Call(lambda x: (x * 2).relu_())
    cost = cost_of(annotated_of(model, torch.randn(4, 6)), aten.relu_.default)
    assert cost.activation_bytes == 0
    assert cost.forward_bytes == 4 * (6 + 6) * B


def test_every_result_of_a_call_counts() -> None:
    model = Call(lambda x: x.max(1))
    cost = cost_of(annotated_of(model, torch.randn(4, 6)), aten.max.dim)
    assert cost.activation_bytes == (4 + 8) * B


def test_activation_bytes_of_a_stack() -> None:
    """The sum over a model is what its forward allocates."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3))
    annotated = annotated_of(model, torch.randn(4, 6))
    made = sympy.Add(*(c.activation_bytes for c in annotated.costs.values()))
    assert made == 4 * (10 + 10 + 3) * B


def test_sizes_cost_nothing() -> None:
    annotated = annotated_of(Call(lambda x: x + torch.ones(x.shape[0], 1)), torch.randn(4, 6))
    sizes = [n for n in annotated.costs if n.startswith("sym_size")]
    assert sizes
    assert all(
        annotated.costs[n].forward_flops == annotated.costs[n].forward_bytes == 0 for n in sizes
    )
