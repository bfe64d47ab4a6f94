"""When the planner lets stages offload: where copies hide, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.passes.devices import H100, Device, Link
from autopipe.planning.plans import Plan

pytestmark = pytest.mark.usefixtures("alike_models_once")
CHUNKS = 8


class Blocks(nn.Module):
    """Layers whose copies take a few times as long as computing at a slow link; a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def linked(gbytes_per_second: float | None) -> Device:
    """An H100 with another link to the host; None: without one."""
    link = None if gbytes_per_second is None else Link(gbytes_per_second)
    return replace(H100, name=f"linked at {gbytes_per_second}", host_link=link)


def planned(
    remat: str, links: Sequence[float | None], memory: int | None = None, schedule: str = "gpipe"
) -> Plan:
    with torch.device("meta"):
        model, x = Blocks(), torch.empty(CHUNKS * 2, 1024, 512)
    return autopipe.plan(
        model,
        len(links),
        CHUNKS,
        device=[linked(link) for link in links],
        remat=remat,
        memory=memory,
        schedule=schedule,
        args=(x,),
    )


def test_on_a_cpu_nothing_is_freed() -> None:
    """What is offloaded from a CPU worker stays in the same memory."""
    none, offload = (planned(remat, [None] * 2) for remat in ("none", "offload"))
    assert offload.stages[0].offloaded_bytes > 0
    assert [t.memory_bytes for t in offload.totals] == [t.memory_bytes for t in none.totals]
    moving = planned("offload", [500.0] * 2)
    assert most_memory(moving) < most_memory(none)


def most_memory(plan: Plan) -> int:
    return max(total.memory_bytes for total in plan.totals)


FAST, SLOW = 1000.0, 1.0


def test_a_fast_link_takes_no_time_and_frees_memory() -> None:
    none, offload = planned("none", [FAST] * 2), planned("offload", [FAST] * 2)
    assert most_memory(offload) < 0.7 * most_memory(none)
    assert offload.step_seconds <= 1.01 * none.step_seconds
    for stage, other in zip(offload.stages, none.stages, strict=True):
        assert stage.recompute_seconds == other.recompute_seconds
        assert stage.saved_bytes == other.saved_bytes
        assert 0.5 * stage.saved_bytes < stage.offloaded_bytes < stage.saved_bytes
        seconds = stage.offloaded_bytes / (FAST * 1e9)
        assert stage.times[0].offload == pytest.approx(seconds)


def test_a_slow_link_takes_as_long_as_its_copies() -> None:
    plan = planned("offload", [SLOW] * 2)
    copies = [CHUNKS * stage.times[0].offload for stage in plan.stages]
    assert plan.step_seconds > max(copies)


def test_the_planner_offloads_where_that_is_faster() -> None:
    limit = most_memory(planned("offload", [FAST] * 2))
    chosen = planned("auto", [FAST] * 2, limit)
    assert {stage.remat for stage in chosen.stages} == {"offload"}
    assert most_memory(chosen) <= limit
    recomputing = planned("auto", [None] * 2, limit)
    assert chosen.step_seconds < recomputing.step_seconds
    for links in ([SLOW] * 2, [None] * 2):
        plan = planned("auto", links, limit)
        assert "offload" not in {stage.remat for stage in plan.stages}
        assert plan.step_seconds == pytest.approx(recomputing.step_seconds, rel=1e-3)


def test_only_the_stages_with_a_fast_link_offload() -> None:
    limit = most_memory(planned("offload", [FAST] * 2))
    chosen = planned("auto", [FAST, SLOW], limit)
    assert [stage.remat == "offload" for stage in chosen.stages] == [True, False]


def test_without_a_limit_nothing_is_offloaded() -> None:
    assert planned("auto", [FAST] * 2).remat == "none"


def test_plans_say_what_is_offloaded(tmp_path: Path) -> None:
    plan = planned("offload", [FAST] * 2)
    assert [plan.offload_counts[k] for k in range(2)] == [CHUNKS, CHUNKS]
    assert f"{CHUNKS} × 72.0 MiB in 75 µs" in str(plan)
    assert "remat offload" in str(plan)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    wrong = replace(plan.stages[0], offloaded_bytes=plan.stages[0].saved_bytes + 1)
    with pytest.raises(autopipe.errors.PlanError, match="offloads more than it saves"):
        replace(plan, stages=(wrong, *plan.stages[1:])).save(path)
    assert "offloads" not in str(planned("full", [FAST] * 2))


def test_the_table_has_a_link_for_each_gpu() -> None:
    """CPU workers share the host's memory: there is nothing to offload to."""
    found = {name: d.host_link for name, d in autopipe.passes.devices.DEVICES.items()}
    assert found.pop("cpu-core") is None
    assert all(link is not None and 20 < link.gbytes_per_second < 63 for link in found.values())
