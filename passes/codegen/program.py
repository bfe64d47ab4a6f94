"""Scheduled + Phased -> Generated: write what each device and each stage does in a step."""

from __future__ import annotations

from itertools import chain, count
from typing import TYPE_CHECKING

from autopipe.errors import VerifyError
from autopipe.passes.graph import quoted
from autopipe.passes.ir import B, phase_functions
from autopipe.passes.schedule import Action, offloads

from .generated import Generated
from .parted_functions import parted_function
from .stage_calls import stage_calls, verb
from .stage_ops import stage_function

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from autopipe.passes.ir import GraphPart, Groups, Phased
    from autopipe.passes.schedule import Offload, Scheduled

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
    *,
    parted: bool = False,
) -> Generated:
    """Write the program of one training step (or of inference).

    Args:
        scheduled: the order of actions.
        phased: the stages cut into phases, by micro-batch size.
        sizes: samples in each micro-batch.
        devices: one per stage.
        parted: whether functions consist of parts that another compiler may compile.

    Raises:
        UnsupportedError: an op, or one of its arguments, has no expression in Python.
        VerifyError: the text cannot express the order of the schedule, a device has no function, or
            the text has a statement that a program does not hold (bugs in autopipe).
    """
    scheduled.verify()
    _verify_forwards(scheduled)
    first = next(iter(phased.values()))
    groups = _groups(scheduled)
    batch = ", ".join("B" if B in phased[s].symbols else str(s) for s in sizes)
    title = f"{scheduled.kind}: {scheduled.stages} stages, micro-batches of {batch}"
    parts = [HEADER.format(title=quoted(title)[1:-1])]
    compilable: list[GraphPart] | None = [] if parted else None
    computes, functions = _stage_functions(groups, phased, sizes, devices, compilable)
    parts += functions
    for stage in first.stages:
        used = {letters for (k, _), row in groups.items() if k == stage.index for letters in row}
        parts += stage_calls(first.split, stage, used)
    leaving = {k for k, policy in enumerate(first.remat) if policy.least_offloaded is not None}
    away = offloads(scheduled, leaving)
    programs: dict[str, list[str]] = {}
    for direction, rows in _passes(scheduled).items():
        programs[direction] = []
        for i, row in enumerate(rows):
            if row:
                start = len(scheduled.devices[i]) - len(row) if direction == "backward" else 0
                calls = _driver_calls(row, start, away[i], computes)
                name = f"device_{i}_{direction}"
                programs[direction].append(name)
                parts.append("\n    ".join([f"def {name}(run):", *calls]) + "\n")
    functions_of = {direction: tuple(names) for direction, names in programs.items()}
    result = Generated("\n\n".join(parts), **functions_of, parts=tuple(compilable or ()))
    result.verify()
    return result


def _driver_calls(
    row: Sequence[Action], start: int, away: Sequence[Offload], computes: Mapping[Action, str]
) -> list[str]:
    """What one device's function calls.

    Args:
        row: its actions.
        start: index of the first among all actions of the device.
        away: what is offloaded there.
        computes: the function of each action.
    """
    left = {o.after: f"run.offload({o.stage}, {o.microbatch})" for o in away}
    fetched: dict[int, list[str]] = {}
    for o in sorted(away, key=lambda o: o.reader):
        fetched.setdefault(o.before, []).append(f"run.fetch({o.stage}, {o.microbatch})")
    calls = []
    for i, a in enumerate(row, start):
        calls += fetched.get(i, [])
        calls.append(f"{verb(a.phase)}_{a.stage}(run, {a.microbatch}, {computes[a]})")
        calls += [left[i]] if i in left else []
    return calls


def _verify_forwards(scheduled: Scheduled) -> None:
    """Check that each stage runs its forwards in the order of micro-batches.

    Buffers that a stage updates pass from one micro-batch to the next, and queues between stages
    are in that order.
    """
    for device, row in enumerate(scheduled.devices):
        for stage in {a.stage for a in row}:
            found = [a.microbatch for a in row if a.stage == stage and a.phase == "F"]
            if found != list(range(scheduled.chunks)):
                raise VerifyError(
                    f"schedule {scheduled.kind!r} cannot be executed: device {device} runs the"
                    f" forwards of stage {stage} in another order than that of micro-batches",
                    expected=f"0 to {scheduled.chunks - 1}",
                    found=", ".join(map(str, found)),
                )


def _groups(scheduled: Scheduled) -> dict[tuple[int, int], Groups]:
    """(stage, micro-batch) -> the phases of its actions, in order."""
    found: dict[tuple[int, int], list[str]] = {}
    for row in scheduled.devices:
        for a in row:
            found.setdefault((a.stage, a.microbatch), []).append(a.phase)
    return {key: tuple(letters) for key, letters in found.items()}


def _passes(scheduled: Scheduled) -> dict[str, list[list[Action]]]:
    """What each device runs in one go: all of a step, or its forwards and then its backwards.

    The caller's loss may stand between the two only if all forwards come first.
    """
    rows = scheduled.devices
    forward = [[a for a in row if a.phase == "F"] for row in rows]
    backward = [[a for a in row if a.phase != "F"] for row in rows]
    if all([*f, *b] == list(row) for f, b, row in zip(forward, backward, rows, strict=True)):
        return {"forward": forward, "backward": backward}
    return {"step": [list(row) for row in rows]}


def _stage_functions(
    groups: Mapping[tuple[int, int], Groups],
    phased: Mapping[int, Phased],
    sizes: Sequence[int],
    devices: Sequence[torch.device],
    parts: list[GraphPart] | None,
) -> tuple[dict[Action, str], list[str]]:
    """Write what stages compute; identical stages share their functions.

    Args:
        groups, phased, sizes, devices: as in `codegen`.
        parts: gets the parts that functions consist of; None: functions have no parts.

    Returns:
        The function of each action; the text of each function.
    """
    labels = _labels(phased)
    computes: dict[Action, str] = {}
    written: dict[tuple[int, Groups, int, torch.device], str] = {}
    names: set[str] = set()
    texts = []
    for size, cut in sorted(phased.items()):
        for stage, device in zip(cut.stages, devices, strict=True):
            k, chunks = stage.index, [m for m, n in enumerate(sizes) if n == size]
            for row in dict.fromkeys(groups[k, m] for m in chunks):
                keys = [
                    (id(stage.graph), row if at else row[:1], at, device) for at in range(len(row))
                ]
                if not written.keys() >= set(keys):
                    functions = phase_functions(stage, row)
                    for letters, key, function in zip(row, keys, functions, strict=True):
                        if key not in written:
                            written[key] = name = _unused(f"{letters}_{k}_{labels[size]}", names)
                            if parts is None:
                                text = stage_function(stage, function, device, name, cut.symbols)
                                texts.append(text)
                            else:
                                found = parted_function(stage, function, device, name, cut.symbols)
                                texts += found[0]
                                parts += found[1]
                for m in chunks:
                    if groups[k, m] == row:
                        calls = zip(row, keys, strict=True)
                        computes |= {Action(letters, k, m): written[key] for letters, key in calls}
    return computes, texts


def _unused(name: str, names: set[str]) -> str:
    """A name that no function has; `name` itself if possible."""
    numbered = (f"{name}_{i}" for i in count(2))
    found = next(n for n in chain((name,), numbered) if n not in names)
    names.add(found)
    return found


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
