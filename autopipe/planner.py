"""Split → `Plan`: what each stage does, in numbers.

Today's planner takes devices, chunks, schedule and rematerialization as given; times are those of a
default device. Choosing them under a memory limit is not implemented; asking for it is an error
(`autopipe.options`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopipe.looks import differentiated, input_looks, state_looks
from autopipe.passes.driver import phases_at
from autopipe.passes.graphs import fingerprint
from autopipe.passes.ir import Kind, at_batch
from autopipe.passes.memory import saved_bytes
from autopipe.passes.phases import Traced
from autopipe.passes.schedule import schedule
from autopipe.passes.staged import CALLER
from autopipe.passes.totals import stage_cost
from autopipe.plans import Crossing, Plan, StagePlan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from autopipe.options import Options
    from autopipe.passes.staged import Phased, Route, Split, StageGraph


def phases_of(
    model: nn.Module, split: Split, leaves: Sequence[Any], sizes: Sequence[int], options: Options
) -> dict[int, Phased]:
    """The phases of a split program in training, by micro-batch size; weights are not needed.

    Args:
        model: what was captured.
        split: the stages.
        leaves: a call's flattened inputs.
        sizes: samples in each micro-batch.
        options: devices and rematerialization.
    """
    captured = split.captured
    state = state_looks(captured, lambda item: captured.held(model, item))
    return phases_at(
        split,
        sizes,
        {size: state | input_looks(captured, leaves, size) for size in dict.fromkeys(sizes)},
        options.devices,
        remat=options.remat,
        grad=True,
        differentiated=differentiated(captured),
        traced=Traced(),
    )


def plan(
    model: nn.Module,
    split: Split,
    phased: Mapping[int, Phased],
    sizes: Sequence[int],
    options: Options,
) -> Plan:
    """The plan of a split program for a sequence of micro-batch sizes; `phased` by size."""
    size = max(sizes)
    order = schedule(options.schedule, len(split.stages), len(sizes))
    made = Plan(
        model=type(model).__name__,
        training=model.training,
        graph=fingerprint(split.captured.graph_module.graph),
        schedule=options.schedule,
        remat=options.remat,
        chunks=options.chunks,
        sizes=tuple(sizes),
        stages=tuple(
            _stage(
                split,
                stage,
                str(device),
                size,
                again=options.remat == "full",
                saved=[_saved(phased[s], stage.index) for s in sizes],
                in_flight=in_flight,
            )
            for stage, device, in_flight in zip(
                split.stages, options.devices, order.in_flight(), strict=True
            )
        ),
        crossings=tuple(_crossing(r, size) for r in split.routes.values() if r.consumers),
        notes=split.captured.notes,
    )
    made.verify()
    return made


def _stage(
    split: Split,
    stage: StageGraph,
    device: str,
    size: int,
    *,
    again: bool,
    saved: Sequence[int],
    in_flight: int,
) -> StagePlan:
    calls = split.calls[stage.index]
    cost = stage_cost(split, stage, size)
    return StagePlan(
        first=split.firsts[stage.index],
        calls=len(calls),
        device=device,
        parameters=tuple(i.target for i in stage.held if i.kind is Kind.PARAMETER),
        flops=at_batch(cost.flops, size),
        forward_seconds=cost.forward_seconds,
        backward_seconds=cost.backward_seconds,
        recompute_seconds=cost.recompute_seconds if again else 0.0,
        parameter_bytes=cost.parameter_bytes,
        activation_bytes=at_batch(cost.activation_bytes, size),
        saved_bytes=max(saved),
        in_flight=in_flight,
        peak_saved_bytes=max(
            sum(saved[m : m + in_flight]) for m in range(len(saved) - in_flight + 1)
        ),
    )


def _saved(phased: Phased, stage: int) -> int:
    """Bytes that a micro-batch saves; in inference none."""
    return saved_bytes(phased.stages[stage]) if phased.differentiated else 0


def _crossing(route: Route, size: int) -> Crossing:
    dtype = str(route.spec.dtype).removeprefix("torch.")
    return Crossing(
        name=route.name,
        kind=route.kind,
        looks=f"{dtype}[{', '.join(map(str, route.spec.shape))}]",
        source=None if route.source == CALLER else route.source,
        targets=route.consumers,
        returned=route.output is not None,
        nbytes=at_batch(route.spec.nbytes, size),
    )
