"""What the private names of torch are used for: if a new torch changes one, it shows here.

Covers passes/_torch_patches.py.
"""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import fx, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from autopipe.passes._torch import (
    BatchNormBase,
    FunctionalTensorMode,
    emit_expression,
    from_functional,
    is_functorch_call,
    is_traced,
    make_fx,
    mark_recorded,
    min_cut_saved,
    preserve_node_meta,
    set_traced_call,
    storage_id,
    storage_id_of,
    symbolic_fake_mode,
    to_functional,
    traced_call,
)
from autopipe.passes._torch_modes import (
    has_tangent,
    in_functorch_transform,
    without_saved_tensor_hooks,
)
from autopipe.passes.graph.fake_strides import static_fake_mode

aten = torch.ops.aten


def test_storages_are_equal_for_aliases() -> None:
    x = torch.zeros(4, 6)
    assert storage_id(x) == storage_id(x.t()) == storage_id(x[1:])
    assert storage_id(x) != storage_id(x.clone())
    with static_fake_mode():
        fake = torch.zeros(4, 6)
        assert storage_id(fake) == storage_id(fake[1:]) != storage_id(fake + 1)
    node = fx.Graph().placeholder("x")
    node.meta["val"] = x
    assert storage_id_of(node) == storage_id(x)
    node.meta["val"] = 3
    assert storage_id_of(node) is None


def test_functional_tensors_apply_writes_to_a_new_value() -> None:
    x = torch.zeros(3)
    with FunctionalTensorMode():
        wrapped = to_functional(x)
        assert is_traced(wrapped)
        wrapped[1:].add_(1)
        after = from_functional(wrapped)
    assert after.tolist() == [0, 1, 1]
    assert x.tolist() == [0, 0, 0]
    assert from_functional(x) is x
    assert not is_traced(x)


def test_sizes_become_symbolic() -> None:
    with symbolic_fake_mode() as mode:
        assert is_traced(mode.from_tensor(torch.zeros(4)))


def test_recorded_calls_are_attributed_and_marked() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        set_traced_call(7, None)
        assert traced_call() == 7
        y = x.sin()
        with mark_recorded("seen"):
            y = y.cos()
        return y.exp()

    with preserve_node_meta():
        graph = make_fx(function)(torch.zeros(2)).graph
    custom = {n.target: n.meta["custom"] for n in graph.nodes if n.op == "call_function"}
    assert custom == {
        aten.sin.default: {"call": 7},
        aten.cos.default: {"call": 7, "seen": True},
        aten.exp.default: {"call": 7},
    }


def test_size_expressions_become_calls() -> None:
    b = sympy.Symbol("B")
    for expr, expected in ((b, 6), (2 * b + 1, 13), (b * b - b, 30)):
        graph = fx.Graph()
        graph.output(emit_expression(expr, {b: graph.placeholder("batch")}))
        assert fx.GraphModule({}, graph)(6) == expected


def test_transforms_around_a_call_are_seen() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(in_functorch_transform([x]))
        return x.sum()

    x = torch.ones(3)
    function(x)
    torch.func.grad(function)(x)
    torch.vmap(function)(x[None])
    assert seen == [False, True, True]
    assert not is_functorch_call(aten.add.Tensor)
    assert is_functorch_call(torch._functorch.predispatch._vmap_increment_nesting)


def test_tangents_of_forward_mode_are_seen() -> None:
    x = torch.ones(3)
    assert not has_tangent(x)
    with forward_ad.dual_level():
        assert has_tangent(forward_ad.make_dual(x, x))
        assert not has_tangent(x)


def test_hooks_on_saved_tensors_are_ignored_until_exit() -> None:
    seen: list[torch.Tensor] = []
    x = torch.ones(2, requires_grad=True)
    with saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
        with without_saved_tensor_hooks():
            with without_saved_tensor_hooks():
                x.exp()
            x.exp()
        assert seen == []
        x.exp()
    assert len(seen) == 1


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_batch_norms_have_one_base(norm: type[nn.Module]) -> None:
    assert issubclass(norm, BatchNormBase)
    assert not issubclass(nn.GroupNorm, BatchNormBase)


def test_the_partitioner_saves_less_with_a_smaller_budget() -> None:
    def joint(primals: list[torch.Tensor], tangents: list[torch.Tensor]) -> list[torch.Tensor]:
        (x, w), (g,) = primals, tangents
        h = x
        for _ in range(4):
            h = torch.tanh(h @ w)
        (found,) = torch.autograd.grad(h, w, g)
        return [h, found]

    with static_fake_mode():
        x, w, g = torch.randn(64, 8), torch.randn(8, 8, requires_grad=True), torch.randn(64, 8)
        module = make_fx(joint, _allow_non_fake_inputs=True)([x, w], [g])
        saved = [min_cut_saved(module, [x, w, g], 1, budget) for budget in (1.0, 0.0)]
    names = {n.name for n in module.graph.nodes}
    assert saved[0] <= names
    assert len(saved[1]) < len(saved[0])
