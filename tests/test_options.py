"""Options of `compile` and `plan`: what is accepted, what is left to the planner.

Covers beside_plan.py, schedule_option.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from autopipe.errors import AutopipeError, OptionError
from autopipe.options import Options, models_of, parse_options
from autopipe.passes.devices import CPU_CORE, L4
from autopipe.passes.remat_policies import parse_policy
from autopipe.passes.schedule import DEFAULT_KIND, schedule_for
from tests.support.plans import made_plan

FULL, NONE = parse_policy("full"), parse_policy("none")


def options(**given: Any) -> Options:
    defaults: dict[str, Any] = {
        "devices": ["cpu", "cpu"],
        "chunks": 4,
        "schedule": None,
        "remat": None,
        "memory": None,
        "in_dims": 0,
        "out_reduce": None,
        "batch_norm": "deferred",
    }
    return parse_options(**(defaults | given))


def test_defaults() -> None:
    found = options()
    assert found.devices == (torch.device("cpu"),) * 2
    assert found.resolved == (4, (FULL, FULL))
    assert found.schedule == found.order == schedule_for(DEFAULT_KIND, 2)
    assert (found.limits, found.models, found.plan) == (None, None, None)
    assert found.stage_models == models_of(found.devices) == (CPU_CORE,) * 2
    assert not found.needs_planning
    assert found.exact
    assert not options(exact=False).exact


@pytest.mark.parametrize(
    "given",
    [{"chunks": None}, {"remat": "auto"}, {"schedule": "auto"}, {"memory": 1}, {"profile": True}],
)
def test_what_is_left_open_needs_planning(given: dict[str, Any]) -> None:
    found = options(**given)
    assert found.needs_planning
    assert found.order.name == DEFAULT_KIND


def test_one_value_or_one_per_stage() -> None:
    assert options(memory="1KiB").limits == (1024, 1024)
    assert options(memory=[1, 2]).limits == (1, 2)
    assert options(device="l4").stage_models == (L4, L4)
    with pytest.raises(OptionError, match="one for each device"):
        options(memory=[1, 2, 3])


def test_one_value_per_device_or_per_stage() -> None:
    """zb-v puts stages 0 and 3 on device 0, stages 1 and 2 on device 1."""
    found = options(
        schedule="zb-v", device=["l4", "cpu-core"], remat=["full", "none"], memory=[8, 6]
    )
    assert found.stage_models == (L4, CPU_CORE, CPU_CORE, L4)
    assert found.stage_remat == (FULL, NONE, NONE, FULL)
    assert found.stage_limits == (4, 3, 3, 4)
    assert len(found.stage_devices) == 4
    each = options(schedule="zb-v", remat=["full", "none", "full", "full"])
    assert each.stage_remat == (FULL, NONE, FULL, FULL)
    assert options(schedule="interleaved", virtual_stages=3).order.homes == (0, 1, 0, 1, 0, 1)


def test_one_micro_batch_that_was_asked_for_is_the_whole_batch() -> None:
    assert options(chunks=1).whole_batch
    assert not options(chunks=2).whole_batch
    assert not options(chunks=None).whole_batch


class Unprintable:
    """A value of a user's whose text fails."""

    def __repr__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("given", "error", "problem"),
    [
        ({"devices": None}, OptionError, "needs devices"),
        ({"chunks": 0}, OptionError, "number of micro-batches"),
        ({"chunks": True}, OptionError, "number of micro-batches"),
        ({"schedule": "fifo"}, OptionError, "unknown schedule"),
        ({"schedule": "zb-v", "virtual_stages": 3}, OptionError, "virtual_stages"),
        ({"schedule": "gpipe", "virtual_stages": 2}, OptionError, "virtual_stages"),
        ({"schedule": "interleaved", "virtual_stages": 0}, OptionError, "virtual_stages"),
        ({"schedule": "auto", "virtual_stages": 2}, OptionError, "stages per device"),
        ({"virtual_stages": "2"}, OptionError, "virtual_stages"),
        ({"schedule": "zb-v", "remat": ["full"] * 3}, OptionError, "one for each device"),
        ({"mode": "default"}, OptionError, "for inductor only"),
        ({"backend": "inductor", "mode": "fast"}, OptionError, "unknown mode"),
        ({"backend": "jit"}, OptionError, "unknown backend"),
        ({"out_reduce": "max"}, OptionError, "unknown out_reduce"),
        ({"batch_norm": "global"}, OptionError, "unknown batch_norm"),
        ({"remat": "some"}, OptionError, "unknown remat"),
        ({"loss_fn": "mse"}, OptionError, "loss_fn is no function"),
        ({"exact": None}, OptionError, "`exact`"),
        ({"exact": 1}, OptionError, "`exact`"),
        ({"exact": Unprintable()}, OptionError, "<Unprintable>"),
        ({"chunks": Unprintable()}, OptionError, "<Unprintable>"),
        ({"schedule": Unprintable()}, OptionError, "<Unprintable>"),
        ({"remat": Unprintable()}, OptionError, "<Unprintable>"),
        ({"remat": [Unprintable(), "full"]}, OptionError, "<Unprintable>"),
        ({"backend": Unprintable()}, OptionError, "<Unprintable>"),
        ({"out_reduce": Unprintable()}, OptionError, "<Unprintable>"),
        ({"batch_norm": Unprintable()}, OptionError, "<Unprintable>"),
    ],
)
def test_wrong_options(given: dict[str, Any], error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem) as caught:
        options(**given)
    if isinstance(given.get("schedule"), str) and problem == "unknown schedule":
        assert isinstance(caught.value, AutopipeError)
        assert {"gpipe", "auto"} <= {*re.findall(r"[\w-]+", str(caught.value.expected))}


def test_options_beside_a_plan() -> None:
    plan = made_plan(2)
    found = options(plan=plan, devices=None, chunks=None)
    assert found.plan is plan
    assert found.resolved.chunks == plan.chunks
    assert [p.name for p in found.resolved.remat] == [s.remat for s in plan.stages]
    assert not found.needs_planning
    with pytest.raises(OptionError, match="chunks is not the plan's"):
        options(plan=plan, devices=None, chunks=plan.chunks + 1)
    with pytest.raises(OptionError, match="devices is not the plan's"):
        options(plan=plan, devices=3, chunks=None)
    with pytest.raises(OptionError, match="a memory limit beside a plan"):
        options(plan=plan, devices=None, chunks=None, memory=1)
