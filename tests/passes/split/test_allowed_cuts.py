"""Cuts around whole modules and in front of listed ones. Covers split/allowed_cuts.py."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from autopipe.errors import PartitionError
from autopipe.passes.cost.node_costs import annotate
from autopipe.passes.devices import DEFAULT, H100, Device
from autopipe.passes.ir.captured import Annotated
from autopipe.passes.ir.split import Split
from autopipe.passes.split.allowed_cuts import CutAt, module_calls
from autopipe.passes.split.cut import split
from autopipe.passes.split.follow_cut import EarlierCut
from autopipe.passes.split.objective import objective_of
from autopipe.passes.split.replay_plan import planned_cut_of
from tests.support.programs import calls, captured_of


class Block(nn.Module):
    """Two linear maps with a shortcut; the block masks by what is computed once, outside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x * mask)))


class Model(nn.Module):
    """Four blocks of two kinds, the last of which is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask = (keep > 0).unsqueeze(-1)
        for block in self.blocks:
            x = block(x, mask)
        x = self.blocks[3](self.blocks[3](x, mask), mask)
        return self.head(self.act(x * 2))


@functools.cache
def captured() -> Annotated:
    return annotate(captured_of(Model(), torch.randn(4, 8), torch.ones(4)))


def cut(stages: int, cut_at: CutAt, device: Device = DEFAULT) -> Split:
    return split(captured(), objective_of([device] * stages, 2, cut_at=cut_at))


def paths(names: Sequence[str]) -> frozenset[str]:
    return frozenset(names)


BLOCKS = CutAt(whole=paths([f"blocks.{n}" for n in range(4)]))


def test_each_call_of_a_module_counts_by_itself() -> None:
    found = module_calls(calls(captured().captured.graph_module.graph))
    of_blocks = [c for c in found.values() if c.path in BLOCKS.whole]
    assert [c.path for c in of_blocks] == [f"blocks.{n}" for n in (0, 1, 2, 3, 3, 3)]
    assert all(a.last < b.first for a, b in pairwise(of_blocks))


def stages_of_blocks(found: Split) -> list[set[int]]:
    """For each call of a block the stages of its ops."""
    stages: dict[str, set[int]] = {}
    for k, ops in enumerate(found.ops):
        for node in ops:
            called = zip(node.meta.get("modules", ()), node.meta.get("calls", ()), strict=True)
            for path, call in called:
                if path in BLOCKS.whole:
                    stages.setdefault(call, set()).add(k)
    return list(stages.values())


@pytest.mark.parametrize("stages", [2, 4, 6])
@pytest.mark.parametrize("device", [DEFAULT, H100], ids=lambda d: d.name)
def test_blocks_are_not_cut(stages: int, device: Device) -> None:
    found = stages_of_blocks(cut(stages, BLOCKS, device))
    assert [len(one) for one in found] == [1] * 6


def test_without_it_blocks_are_cut() -> None:
    assert max(len(one) for one in stages_of_blocks(cut(4, CutAt()))) > 1


def test_listed_modules_are_where_stages_start() -> None:
    found = cut(3, CutAt(starts=paths(["blocks.1.up", "head"])))
    assert [ops[0].meta["modules"][-1] for ops in found.ops[1:]] == ["blocks.1.up", "head"]
    several = cut(3, CutAt(starts=paths(["blocks.1", "blocks.3", "head"])))
    starts = [ops[0].meta["modules"][0] for ops in several.ops[1:]]
    assert starts[0] != starts[1]
    assert {*starts} <= {"blocks.1", "blocks.3", "head"}


def test_both_restrict_a_cut() -> None:
    found = cut(2, CutAt(BLOCKS.whole, paths(["blocks.1.up", "blocks.2"])))
    assert found.ops[1][0].meta["modules"] == ["blocks.2"]


def test_too_few_positions() -> None:
    """`act` changes what was computed before it, in place."""
    starts = paths(["blocks.2", "act", "gone"])
    with pytest.raises(PartitionError, match="where `cut_at` allows it") as caught:
        cut(3, CutAt(starts=starts))
    assert "1 positions to cut at; none at 'act', 'gone'" in str(caught.value)


def test_later_captures_and_plans_follow() -> None:
    """A plan is replayed without the option; another capture of the model keeps blocks whole."""
    found = cut(3, BLOCKS)
    objective = objective_of([DEFAULT] * 3, 2)
    replayed = split(captured(), objective, planned=planned_cut_of(found), must_fit=True)
    assert replayed.firsts == found.firsts
    followed = split(captured(), objective_of([DEFAULT] * 3, 2), earlier=EarlierCut.of(found))
    assert followed.firsts == found.firsts
