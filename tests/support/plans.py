"""Plans made by hand: of any size, for what is drawn of a plan; with cuts at given calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

import autopipe
from autopipe.planning.plan_parts import (
    ONCE,
    Crossing,
    DeviceTotal,
    DuplicatedCall,
    Segment,
    StagePlan,
    Times,
)
from autopipe.planning.plans import Plan


def crossing(
    name: str,
    source: int | None,
    *targets: int,
    nbytes: int = 1024,
    kind: str = "activation",
    gradient: str | None = None,
) -> Crossing:
    kind = "input" if source is None else kind
    return Crossing(name, kind, "float32[B, 16]", source, targets, False, nbytes, gradient)


def made_plan(
    stages: int = 3,
    sizes: Sequence[int] = (4, 4, 3),
    crossings: Sequence[Crossing] | None = None,
    **facts: Any,
) -> Plan:
    """K stages: stage k takes (k + 2) ms forward and again, two and a half times that backward."""
    if crossings is None:
        crossings = [crossing("x", None, 0)]
        crossings += [crossing(f"h_{k}", k, k + 1, nbytes=512 * (k + 1)) for k in range(stages - 1)]
    remat, limit = facts.pop("remat", "full"), facts.pop("limit", None)

    def times(factor: int) -> Times:
        return Times(1e-3 * factor, 1e-3 * factor, 2.5e-3 * factor, 0.0, 0.0, 0.0)

    plan = Plan(
        model=facts.pop("model", "Net"),
        training=True,
        whole=False,
        graph="0123456789abcdef",
        schedule=facts.pop("schedule", "gpipe"),
        actions=(),
        devices=stages,
        chunks=len(sizes),
        sizes=tuple(sizes),
        stages=tuple(
            StagePlan(
                first=f"linear_{k}",
                modules=f"layers.{k}",
                calls=3 + k,
                device="cpu",
                parameters=(f"layers.{k}.weight", f"layers.{k}.bias"),
                speeds="cpu-core",
                remat=remat,
                flops=10**6 * (k + 1),
                times=(times(k + 2),) * len(set(sizes)),
                parameter_bytes=4096 * (k + 1),
                gradient_bytes=4096 * (k + 1),
                optimizer_bytes=8192 * (k + 1),
                buffer_bytes=100 * k,
                shared_copy_bytes=0,
                activation_bytes=2048 * (k + 1),
                saved_bytes=1000 * (k + 1),
                in_flight=len(sizes),
                peak_saved_bytes=1000 * (k + 1) * len(sizes),
                peak_bytes=1000 * (k + 1) * len(sizes) + 2048,
                limit_bytes=limit,
            )
            for k in range(stages)
        ),
        totals=tuple(
            DeviceTotal(
                peak_saved_bytes=1000 * (k + 1) * len(sizes),
                memory_bytes=(4096 + 8192 + 1000 * len(sizes)) * (k + 1) + 100 * k + 2048,
                limit_bytes=limit,
            )
            for k in range(stages)
        ),
        crossings=tuple(crossings),
        segments=(),
        duplicated=(),
        bound_seconds=4e-3 * stages,
        cut_seconds=4.5e-3 * (stages + 1),
        gather_seconds=facts.pop("gather", 0.0),
        notes=facts.pop("notes", ()),
    )
    assert not facts, facts
    plan.verify()
    return plan


def whole_plan() -> Plan:
    """A plan in which every list has an entry, and every field that may be None a value."""
    sent = [crossing("x", None, 0), crossing("h", 0, 1, 2), crossing("g", 0, 1)]
    sent += [crossing("k", 1, 2, nbytes=2048)]
    sent += [crossing("w", 0, 2, kind="parameter", gradient=ONCE)]
    plan = made_plan(3, (4, 4, 3), sent, limit=2**30, gather=1e-4, notes=("a note", "another"))
    segments = tuple(Segment(f"call_{i}", i % 3) for i in range(4))
    duplicated = (DuplicatedCall("mask", (0, 2)), DuplicatedCall("table", (1, 2)))
    return replace(plan, segments=segments, duplicated=duplicated)


def plan_at(
    starts: Sequence[str], model: nn.Module, chunks: int, *args: Any, remat: str, **kwargs: Any
) -> Plan:
    """The plan of a model's call, on the CPU, in which stages start at these calls as captured."""
    given: dict[str, Any] = {"remat": remat, "args": args, "kwargs": kwargs}
    plan = autopipe.plan(model, ["cpu"] * (len(starts) + 1), chunks, **given)
    order = autopipe.plan(model, ["cpu"], chunks, **given)  # in one stage no call is moved
    firsts = (order.stages[0].first, *starts)
    pairs = zip(plan.stages, firsts, strict=True)
    stages = tuple(replace(stage, first=first) for stage, first in pairs)
    return replace(plan, graph=order.graph, stages=stages, segments=(), duplicated=())
