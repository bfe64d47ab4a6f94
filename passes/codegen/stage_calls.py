"""Write what a stage does with one micro-batch besides computing: receive, send, keep values.

Each function computes some phases; its name says which:

    forward    F                    recompute  R
    backward   BW or RBW            gradients  B or RB, before
                                    weights    W
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.passes.graph import quoted
from autopipe.passes.ir import CALLER
from autopipe.passes.schedule import Queue, StageMessages

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from autopipe.passes.ir import Split, StagePhases


def verb(letters: str) -> str:
    """What a function is called that computes some phases.

    Args:
        letters: of the phases.
    """
    if "F" in letters:
        return "forward"
    if "B" in letters:
        return "backward" if "W" in letters else "gradients"
    return "weights" if "W" in letters else "recompute"


def stage_calls(split: Split, stage: StagePhases, used: Collection[str]) -> list[str]:
    """Write the functions of a stage.

    Args:
        split: where values go.
        stage: which values it takes and returns.
        used: the groups of phases that the schedule runs.

    Returns:
        Source of each function, forward first.
    """
    verbs = {verb(letters) for letters in used}
    functions = [_forward(split, stage)] if "forward" in verbs else []
    for name in ("recompute", "gradients", "weights", "backward"):
        if name in verbs:
            functions.append(_backward(split, stage, name))
    return functions


def stage_messages(split: Split, stage: StagePhases) -> StageMessages:
    """What a stage receives from other stages and sends to them, in the order of its functions.

    Args:
        split: where values come from and go.
        stage: which values it takes and returns.
    """
    k, routes = stage.index, split.routes
    sources = [(n, routes[n].source) for n in stage.receives]
    later = [(n, routes[n].gradient_from(k)) for n in stage.tangents]
    earlier = [(n, routes[n].gradient_to(k)) for n in stage.sent_grads]
    return StageMessages(
        received={
            "F": [Queue(n, source, k) for n, source in sources if source != CALLER],
            "B": [Queue(f"grad {n}", source, k) for n, source in later if source is not None],
        },
        sent={
            "F": [Queue(n, k, to) for n in stage.returns for to in routes[n].consumers],
            "B": [Queue(f"grad {n}", k, to) for n, to in earlier if to not in (None, CALLER)],
        },
    )


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


def _backward(split: Split, stage: StagePhases, name: str) -> str:
    """Write a part of the backward: which tangents to receive, where to send gradients."""
    k = stage.index
    arguments = [f"*run.state({k})", f"*run.pop_saved({k}, m)"]
    sent = []
    if name in ("gradients", "backward"):
        arguments += [f"run.receive({quoted(f'grad {n}')}, {k}, m)" for n in stage.tangents]
        sent = [
            _sent(f"grad {n}", k, split.routes[n].gradient_to(k), position)
            for position, n in enumerate(stage.sent_grads)
        ]
    names = [quoted(n) for n in stage.own_grads]
    lines = [
        f"def {name}_{k}(run, m, compute):",
        f"    ctx = run.context({k}, m, [{_listed(names)}])",
        f"    results = compute(ctx, [{_listed(arguments)}])",
        *sent,
    ]
    if name in ("recompute", "gradients"):
        lines.append(f"    run.save({k}, m, results[{len(sent)}:])")
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
