"""Scheduled + Phased -> Generated: write the pipeline as Python source text.

The text has three layers; each calls the layer before it:

    F_1_b4, RBW_1_b4      what stage 1 computes on a micro-batch of 4, in ATen operators
    forward_1             one micro-batch at stage 1: receive, compute, send, save
    device_1_forward      what the worker of device 1 does in one step: its list of actions

The text needs only torch and the `run` object that the runtime passes in; it calls the methods of
`autopipe.runtime.executor.Run`. `pipe.code` is this text. Functions get their arguments in a list
and empty it, so that a value is freed after its last use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import fx

from autopipe.errors import VerifyError
from autopipe.passes.ir import CALLER, Phased, Split, StagePhases

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.passes.schedule import Action, Scheduled

HEADER = '''\
"""{title}"""

from math import inf, nan

import torch
from torch import device
'''


@dataclass(frozen=True)
class Generated:
    """A program as text.

    Attributes:
        source: a Python module.
        forward: names of its functions that run a step's forward, one per device; each is called
            as ``device_1_forward(run)``.
        backward: likewise for the backward; empty for inference.
    """

    source: str
    forward: tuple[str, ...]
    backward: tuple[str, ...]

    def verify(self) -> None:
        code = compile(self.source, "<generated>", "exec")
        defined = {c.co_name for c in code.co_consts if hasattr(c, "co_name")}
        for name in (*self.forward, *self.backward):
            if name not in defined:
                raise VerifyError("a device without a function", expected=name)

    def __str__(self) -> str:
        return self.source


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
        VerifyError: the text cannot express the order of the schedule, or a device has no function
            (bugs in autopipe).
    """
    _verify_two_passes(scheduled)
    split = next(iter(phased.values())).split
    names = sorted({a.phase for row in scheduled.devices for a in row})
    batch = ", ".join(map(str, sizes))
    title = f"{scheduled.kind}: {scheduled.stages} stages, micro-batches of {batch}"
    parts = [HEADER.format(title=title)]
    computes: dict[tuple[str, int, int], str] = {}
    written: dict[tuple[int, str, torch.device], str] = {}
    for size, cut in sorted(phased.items()):
        for stage, device in zip(cut.stages, devices, strict=True):
            for phase in names:
                key = (id(stage.graph), phase, device)
                if key not in written:  # identical stages share their functions
                    written[key] = f"{phase}_{stage.index}_b{size}"
                    parts.append(stage_function(stage, phase, device, written[key]))
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
    arguments += [f'run.receive("{n}", {k}, m)' for n in stage.receives]
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
        lines.append(f'    run.update_buffer("{name}", {k}, results[{position}])')
        position += 1
    if stage.saved:
        lines.append(f"    run.save({k}, m, results[{position}:])")
    return "\n".join(lines) + "\n"


def _backward(split: Split, stage: StagePhases) -> str:
    """Write the backward of one micro-batch: which tangents to receive, where to send gradients."""
    k = stage.index
    arguments = [f"*run.state({k})", f"*run.pop_saved({k}, m)"]
    arguments += [f'run.receive("grad {n}", {k}, m)' for n in stage.tangents]
    names = [f'"{n}"' for n in stage.own_grads]
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
        return f'    run.return_to_caller("{value}", m, results[{position}])'
    return f'    run.send("{value}", {stage}, {to}, m, results[{position}])'


def _listed(arguments: Sequence[str]) -> str:
    joined = ", ".join(arguments)
    if len(joined) < 60:
        return joined
    return "\n        " + ",\n        ".join(arguments) + ",\n    "


def stage_function(stage: StagePhases, phase: str, device: torch.device, name: str) -> str:
    """Write the ops of some phases as a function ``name(ctx, args)``, which empties `args`.

    `StagePhases` shows the arguments and results of these functions.

    Args:
        stage: its joint graph has the ops.
        phase: letters of the phases whose ops are written: "F", or some of "RBW".
        device: where the function runs.
        name: of the function.

    Returns:
        Python source of the function.
    """
    by_name = {n.name: n for n in stage.graph.nodes}
    ctx, *placeholders = [n for n in stage.graph.nodes if n.op == "placeholder"]
    count = len(stage.state)
    state, received = placeholders[:count], placeholders[count : count + len(stage.receives)]
    tangents = placeholders[count + len(stage.receives) :]
    saved = [by_name[n] for n in stage.saved]
    results = stage.results()
    own_grads: dict[fx.Node, list[int]] = {}
    if phase == "F":
        arguments = [*state, *received]
        values = [*results["returns"], *results["updates"], *saved]
    else:
        arguments = [*state, *saved, *tangents]
        values = results["sent_grads"]
        for i, node in enumerate(results["own_grads"]):
            own_grads.setdefault(node, []).append(i)
    tangent_names = [f"grad_{n}" for n in stage.tangents]
    labels = [*stage.state, *stage.receives, *tangent_names]
    label_of = dict(zip(placeholders, labels, strict=True))
    graph = fx.Graph()
    env = {ctx: graph.placeholder(ctx.name)}
    for node in arguments:
        env[node] = graph.placeholder(label_of.get(node, node.name))
        env[node].target = env[node].name  # fx makes names unique, but not targets
        env[node].meta = {"val": node.meta["val"]}
    for node in stage.graph.nodes:
        if stage.phase_of.get(node.name, "-") in phase:
            env[node] = graph.node_copy(node, env.__getitem__)
            _replace_device(env[node], stage.device, device)
        for i in own_grads.get(node, ()):  # immediately, so that only the sum stays alive
            done = graph.call_method("accumulate", (env[ctx], i, env[node]))
            done.meta = {"stack_trace": node.meta.get("stack_trace")}
    graph.output([env[v] if isinstance(v, fx.Node) else v for v in values])
    return _text(graph, name)


def _replace_device(node: fx.Node, traced: torch.device, device: torch.device) -> None:
    """Replace the traced device by the one that runs; both have the same type."""
    if traced != device:
        node.kwargs = {k: device if v == traced else v for k, v in node.kwargs.items()}


def _text(graph: fx.Graph, name: str) -> str:
    """Write a function: fx writes the body, with shapes and the model's own lines as comments."""
    source = graph.python_code("self", verbose=True).src
    parameters = [n.name for n in graph.nodes if n.op == "placeholder"][1:]
    _, _, body = source.partition("\ndef forward(")
    _, _, body = body.partition(":\n")
    head = f"def {name}(ctx, args):\n"
    if parameters:
        head += f"    {_wrapped(parameters)} = args\n    args.clear()\n"
    body = re.sub(r"\n\s*# No stacktrace found for following nodes", "", body)
    lines = [line.rstrip() for line in body.rstrip().splitlines()]
    return head + "\n".join(lines) + "\n"


def _wrapped(parameters: Sequence[str]) -> str:
    if sum(map(len, parameters)) + 2 * len(parameters) < 80:
        return ", ".join(parameters) + ("," if len(parameters) == 1 else "")
    return "(\n        " + ",\n        ".join(parameters) + ",\n    )"
