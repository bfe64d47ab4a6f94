"""Times of a traced stage's phases, against torch's own counter and by hand."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from autopipe.passes.cost.op_counter import counted_flops
from autopipe.passes.cost.phase_memory import stage_bytes
from autopipe.passes.cost.phase_time import (
    PhaseSeconds,
    mean_op_seconds,
    phase_seconds,
    stage_work,
)
from autopipe.passes.devices import H100, L4
from autopipe.passes.ir.phased import PHASES
from tests.support.phased import SIZE, every
from tests.support.programs import known, phased_of, split_of
from tests.support.reference import objective

pytestmark = pytest.mark.few(1)


def flops_of(stage: object, phase: str) -> int:
    work = stage_work(stage)  # type: ignore[arg-type]
    return sum(w.flops for n, w in work.items() if stage.phase_of[n.name] in phase)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["gpt2", "t5", "resnet", "unet", "tied"])
def test_flops_are_those_of_a_step_in_eager(name: str) -> None:
    """Forward and backward of all stages together; with full rematerialization also R."""
    model, inputs, _ = known(name)
    args, kwargs = inputs(SIZE)
    with FlopCounterMode(display=False) as forward:
        loss = objective(model(*args, **kwargs))
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    stages = every(name, "none")
    assert sum(flops_of(s, "F") for s in stages) == forward.get_total_flops() > 0
    assert sum(flops_of(s, "BW") for s in stages) == backward.get_total_flops() > 0
    assert sum(flops_of(s, "R") for s in stages) == 0
    again = [flops_of(s, "R") for s in every(name, "full")]
    assert 0 < sum(again) <= forward.get_total_flops()


def test_seconds_by_hand() -> None:
    """One layer without bias: a product forward, two backward, of which one for the weight."""
    x = torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
    cut = split_of(model, 2, x)
    last = phased_of(cut, model, 4, ((x,), {}), remat="none").stages[1]
    found = phase_seconds(last, L4)
    product = L4.seconds(2 * 4 * 16 * 8, 4 * (4 * 16 + 16 * 8 + 4 * 8), "matmul", "fp32")
    assert found.forward == pytest.approx(product)
    assert found.backward == pytest.approx(product)
    assert found.weight == pytest.approx(product)
    assert found.recompute == 0
    assert found.total == pytest.approx(3 * product)


def test_what_is_kept_decides_what_is_made_again() -> None:
    times = {p: [phase_seconds(s, H100) for s in every("gpt2", p)] for p in ("none", "full")}
    for none, full in zip(times["none"], times["full"], strict=True):
        # (Backwards begin with some zeros of their own, which need no gradient.)
        assert none.recompute < 0.2 * full.recompute
        assert full.recompute <= (full.forward + none.recompute) * (1 + 1e-9)
        assert none.forward == pytest.approx(full.forward)
        later = [s.backward + s.weight for s in (none, full)]
        assert later[0] == pytest.approx(later[1])


def test_phases_are_those_of_the_program() -> None:
    assert PhaseSeconds._fields == ("forward", "recompute", "backward", "weight")
    assert PHASES == ("F", "R", "B", "W")


def test_a_draw_and_a_view() -> None:
    """A draw moves what it makes; a view nothing."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x.view(-1, 4, 2), 0.5).view(-1, 8)

    x = torch.randn(4, 8, requires_grad=True)
    (stage,) = phased_of(split_of(Net(), 1, x), Net(), 4, ((x,), {}), remat="none").stages
    work = {n.name: w for n, w in stage_work(stage).items()}
    views = [w for name, w in work.items() if name.startswith("view")]
    assert views
    assert all(w.moved_bytes == 0 for w in views)
    drawn = [w for name, w in work.items() if "draw" in name]
    assert drawn
    assert all(w.moved_bytes >= 4 * 8 * 4 for w in drawn)


def test_what_is_remembered_of_a_graph_goes_with_it() -> None:
    x = torch.randn(4, 8)
    model = nn.Linear(8, 8)
    (stage,) = phased_of(split_of(model, 1, x), model, 4, ((x,), {}), remat="none").stages
    graph = weakref.ref(stage.graph)
    assert phase_seconds(stage, L4) == phase_seconds(stage, L4)
    assert stage_bytes(stage) == stage_bytes(stage)
    del stage
    gc.collect()
    assert graph() is None


def test_the_mean_of_all_ops() -> None:
    stages = every("gpt2", "none")
    whole = sum(phase_seconds(stage, L4).total for stage in stages)
    count = sum(len(stage_work(stage)) for stage in stages)
    assert mean_op_seconds(stages, L4) == pytest.approx(whole / count)
    assert mean_op_seconds([], L4) == 0


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_every_query_of_a_group_counts(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: two products forward, five backward, each of 2 · 40 · 40 · 16 FLOPs a query head.

    torch's formulas refused grouped queries before 2.13, as the ones here do.
    """
    aten = torch.ops.aten
    for packet in (aten._scaled_dot_product_flash_attention,
                   aten._scaled_dot_product_flash_attention_backward):  # fmt: skip
        formula = flop_registry[packet]

        def strict(*args: Any, formula: Any = formula, **kwargs: Any) -> Any:
            shapes = [x.shape[1] for x in args if isinstance(x, Tensor) and x.dim() == 4]
            assert len(set(shapes)) == 1
            return formula(*args, **kwargs)

        monkeypatch.setitem(flop_registry, packet, strict)
    q, k, v, sums = (torch.empty(2, n, 40, 16, device="meta") for n in (4, heads, heads, 4))
    one = 2 * 4 * 2 * 40 * 40 * 16
    forward = aten._scaled_dot_product_flash_attention.default
    assert counted_flops(forward, (q, k, v), {}, None) == 2 * one
    backward = aten._scaled_dot_product_flash_attention_backward.default
    rest = (sums[..., 0], None, None, 40, 40, 0.0, False, None, None)
    assert counted_flops(backward, (q, q, k, v, q, *rest), {}, None) == 5 * one
    assert counted_flops(aten.gelu.default, (q,), {}, q) == 0
