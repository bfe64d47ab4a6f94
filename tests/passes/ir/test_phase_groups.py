"""Functions of a stage for any grouping of its phases compute what the whole does.

Covers codegen/stage_calls.py (with `tests/system/test_schedules.py`).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopipe.passes.ir import StagePhases
from autopipe.passes.ir.phase_groups import phase_functions
from tests.support.agreement import pipelined

GROUPS = [("F", "RBW"), ("F", "R", "BW"), ("F", "RB", "W"), ("F", "R", "B", "W")]


class Norms(nn.Module):
    """Operators with several results, whose parts other phases read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def stages(remat: str) -> tuple[StagePhases, ...]:
    pipe = pipelined(Norms(), remat=remat)
    pipe(torch.randn(4, 6)).backward()
    _, program = pipe._programs.last
    return next(iter(program.lowered.phased.values())).stages


@pytest.mark.parametrize("remat", ["full", "none", "min-cut"])
@pytest.mark.parametrize("groups", GROUPS)
def test_every_op_and_gradient_is_in_one_function(groups: tuple[str, ...], remat: str) -> None:
    for stage in stages(remat):
        functions = phase_functions(stage, groups)
        ops = [n for n in stage.graph.nodes if n.name in stage.phase_of]
        assert sorted(n.name for f in functions for n in f.nodes) == sorted(n.name for n in ops)
        added = sorted(i for f in functions for each in f.gradients.values() for i in each)
        assert added == list(range(len(stage.own_grads)))


@pytest.mark.parametrize("remat", ["full", "none", "min-cut"])
@pytest.mark.parametrize("groups", GROUPS)
def test_a_function_reads_what_it_gets_and_computes(groups: tuple[str, ...], remat: str) -> None:
    for stage in stages(remat):
        ctx = next(iter(stage.graph.nodes))
        for function in phase_functions(stage, groups):
            known = {ctx, *function.arguments}
            for node in function.nodes:
                assert known.issuperset(node.all_input_nodes)
                known.add(node)
            assert known.issuperset(function.gradients)
            assert known.issuperset(r for r in function.results if r is not None)


@pytest.mark.parametrize("groups", GROUPS)
def test_what_is_kept_is_read_later(groups: tuple[str, ...]) -> None:
    for stage in stages("none"):
        functions = phase_functions(stage, groups)
        assert functions[-1].results == tuple(
            stage.results()["sent_grads"] if "B" in groups[-1] else ()
        )
        for i, function in enumerate(functions[1:-1], start=1):
            later = {
                n for f in functions[i + 1 :] for node in f.nodes for n in node.all_input_nodes
            }
            later |= {n for f in functions[i + 1 :] for n in (*f.gradients, *f.results)}
            sent = len(stage.sent_grads) if "B" in groups[i] else 0
            assert later.issuperset(function.results[sent:])
