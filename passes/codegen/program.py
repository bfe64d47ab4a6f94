"""Scheduled + Phased -> Generated: write what each device and each stage does in a step."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from autopipe.errors import VerifyError
from autopipe.passes.graph import quoted
from autopipe.passes.ir import CALLER, B

from .generated import Generated
from .stage_ops import stage_function

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from autopipe.passes.ir import Phased, Split, StagePhases
    from autopipe.passes.schedule import Action, Scheduled

HEADER = '''\
"""{title}"""

from math import inf, nan

import torch
from torch import device
'''


def codegen(
    scheduled: Scheduled,
    phased: Mapping[int, Phased],
    sizes: Sequence[int],
    devices: Sequence[torch.device],
) -> Generated:
    """Write the program of one training step (or of inference).

    Args:
        scheduled: the order of actions.
        phased: the stages cut into phases, by micro-batch size.
        sizes: samples in each micro-batch.
        devices: one per stage.

    Raises:
        UnsupportedError: an op, or one of its arguments, has no expression in Python.
        VerifyError: the text cannot express the order of the schedule, a device has no function, or
            the text has a statement that a program does not hold (bugs in autopipe).
    """
    _verify_two_passes(scheduled)
    split = next(iter(phased.values())).split
    names = sorted({a.phase for row in scheduled.devices for a in row})
    batch = ", ".join("B" if B in phased[s].symbols else str(s) for s in sizes)
    title = f"{scheduled.kind}: {scheduled.stages} stages, micro-batches of {batch}"
    labels = _labels(phased)
    parts = [HEADER.format(title=quoted(title)[1:-1])]
    computes: dict[tuple[str, int, int], str] = {}
    written: dict[tuple[int, str, torch.device], str] = {}
    for size, cut in sorted(phased.items()):
        for stage, device in zip(cut.stages, devices, strict=True):
            for phase in names:
                key = (id(stage.graph), phase, device)
                if key not in written:  # identical stages share their functions
                    written[key] = f"{phase}_{stage.index}_{labels[size]}"
                    parts.append(stage_function(stage, phase, device, written[key], cut.symbols))
                computes[phase, stage.index, size] = written[key]
    for stage in next(iter(phased.values())).stages:
        parts.append(_forward(split, stage))
        if len(names) > 1:
            parts.append(_backward(split, stage))
    forward = [[a for a in row if a.phase == "F"] for row in scheduled.devices]
    backward = [[a for a in row if a.phase != "F"] for row in scheduled.devices]
    programs: dict[str, list[str]] = {"forward": [], "backward": []}
    for direction, rows in (("forward", forward), ("backward", backward)):
        for i, row in enumerate(rows):
            if row:
                programs[direction].append(f"device_{i}_{direction}")
                parts.append(_program(programs[direction][-1], direction, row, sizes, computes))
    result = Generated("\n\n".join(parts), tuple(programs["forward"]), tuple(programs["backward"]))
    result.verify()
    return result


def _labels(phased: Mapping[int, Phased]) -> dict[int, str]:
    """What functions for a micro-batch size are called: b4, or B where it is symbolic."""
    found: dict[int, str] = {}
    used: dict[int, str] = {}
    for size, cut in sorted(phased.items()):
        if B not in cut.symbols:
            found[size] = f"b{size}"
        else:
            found[size] = used.setdefault(id(cut), f"B{len(used) + 1 if used else ''}")
    return found


def _verify_two_passes(scheduled: Scheduled) -> None:
    """Check that the runtime can execute the step: all forwards, then all whole backwards.

    The text has one function for each of the two, so any other order would run in this order, with
    more saved activations than its plan says. Buffers that a stage updates pass from one
    micro-batch to the next, so forwards must run in the order of micro-batches too.
    """
    trains = any(a.phase != "F" for row in scheduled.devices for a in row)
    phases = ("F", "RBW") if trains else ("F",)
    expected = list(product(phases, range(scheduled.chunks)))
    for device, row in enumerate(scheduled.devices):
        found = [(a.phase, a.microbatch) for a in row]
        if found != expected or {a.stage for a in row} != {device}:
            raise VerifyError(
                f"schedule {scheduled.kind!r} cannot be executed: device {device} does not run all"
                " forwards of one stage, then all its backwards",
                expected="F of micro-batches 0.., then RBW of micro-batches 0.., of the stage with"
                " the device's number",
                found=" ".join(map(str, row)),
            )


def _program(
    name: str,
    direction: str,
    actions: Sequence[Action],
    sizes: Sequence[int],
    computes: Mapping[tuple[str, int, int], str],
) -> str:
    lines = [f"def {name}(run):"]
    for a in actions:
        compute = computes[a.phase, a.stage, sizes[a.microbatch]]
        lines.append(f"    {direction}_{a.stage}(run, {a.microbatch}, {compute})")
    return "\n".join(lines) + "\n"


def _forward(split: Split, stage: StagePhases) -> str:
    """Write the forward of one micro-batch: what to receive and where to send results."""
    k = stage.index
    arguments = [f"*run.state({k})"]
    arguments += [f"run.receive({quoted(n)}, {k}, m)" for n in stage.receives]
    lines = [
        f"def forward_{k}(run, m, compute):",
        f"    results = compute(run.context({k}, m), [{_listed(arguments)}])",
    ]
    position = 0
    for name in stage.returns:
        route = split.routes[name]
        lines += [_sent(name, k, to, position) for to in route.consumers]
        if route.output is not None:
            lines.append(_sent(name, k, CALLER, position))
        position += 1
    for name in stage.updates:
        lines.append(f"    run.update_buffer({quoted(name)}, {k}, results[{position}])")
        position += 1
    if stage.saved:
        lines.append(f"    run.save({k}, m, results[{position}:])")
    return "\n".join(lines) + "\n"


def _backward(split: Split, stage: StagePhases) -> str:
    """Write the backward of one micro-batch: which tangents to receive, where to send gradients."""
    k = stage.index
    arguments = [f"*run.state({k})", f"*run.pop_saved({k}, m)"]
    arguments += [f"run.receive({quoted(f'grad {n}')}, {k}, m)" for n in stage.tangents]
    names = [quoted(n) for n in stage.own_grads]
    lines = [
        f"def backward_{k}(run, m, compute):",
        f"    ctx = run.context({k}, m, [{_listed(names)}])",
        f"    results = compute(ctx, [{_listed(arguments)}])",
    ]
    for position, name in enumerate(stage.sent_grads):
        lines.append(_sent(f"grad {name}", k, split.routes[name].gradient_to(k), position))
    return "\n".join(lines) + "\n"


def _sent(value: str, stage: int, to: int | None, position: int) -> str:
    """Write the call that sends one of a stage's results on."""
    if to == CALLER:
        return f"    run.return_to_caller({quoted(value)}, m, results[{position}])"
    return f"    run.send({quoted(value)}, {stage}, {to}, m, results[{position}])"


def _listed(arguments: Sequence[str]) -> str:
    joined = ", ".join(arguments)
    if len(joined) < 60:
        return joined
    return "\n        " + ",\n        ".join(arguments) + ",\n    "
