"""Options of `compile` and `plan`: what is accepted, what is left to the planner."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from autopipe.errors import AutopipeError, OptionError, UnsupportedError
from autopipe.options import Options, models_of, parse_options
from autopipe.passes.devices import CPU_CORE, L4
from autopipe.passes.remat_policies import parse_policy
from autopipe.passes.schedule import DEFAULT_KIND
from tests.support.plans import made_plan

FULL = parse_policy("full")


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
    assert found.schedule == found.schedule_kind == DEFAULT_KIND
    assert (found.limits, found.models, found.plan) == (None, None, None)
    assert found.device_models == models_of(found.devices) == (CPU_CORE,) * 2
    assert not found.needs_planning


@pytest.mark.parametrize(
    "given",
    [{"chunks": None}, {"remat": "auto"}, {"schedule": "auto"}, {"memory": 1}, {"profile": True}],
)
def test_what_is_left_open_needs_planning(given: dict[str, Any]) -> None:
    found = options(**given)
    assert found.needs_planning
    assert found.schedule_kind == DEFAULT_KIND


def test_one_value_or_one_per_stage() -> None:
    assert options(memory="1KiB").limits == (1024, 1024)
    assert options(memory=[1, 2]).limits == (1, 2)
    assert options(device="l4").device_models == (L4, L4)
    with pytest.raises(OptionError, match="one for each device"):
        options(memory=[1, 2, 3])


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
        ({"schedule": "zb-v"}, UnsupportedError, "does not execute schedule='zb-v'"),
        ({"backend": "inductor"}, UnsupportedError, "not implemented"),
        ({"backend": "jit"}, OptionError, "unknown backend"),
        ({"out_reduce": "max"}, OptionError, "unknown out_reduce"),
        ({"batch_norm": "global"}, OptionError, "unknown batch_norm"),
        ({"remat": "some"}, OptionError, "unknown remat"),
        ({"loss_fn": "mse"}, OptionError, "loss_fn is no function"),
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
    if isinstance(given.get("schedule"), str):
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
