"""Comparisons whose result is the same everywhere, so that a trial does not see what they choose.

``place <= capacity`` is true for all tokens of a small batch, ``score > 5`` false at first.
So a trial moves the threshold of such a comparison into the range of its values. A comparison of
integers from which an index is computed is left as it is: it may keep the index within its sample.
A clamp that gives the same number everywhere (``relu(place - capacity)``) is left out.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from autopipe.passes.graph import is_inexact, is_integer, is_size, tensors_of

from .index_ranges import is_index
from .lattice import STATIC, Mixed, Samples
from .sample_run import FAILURES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .sample_run import SampleRun

aten = torch.ops.aten

STRICT_BELOW = (aten.lt, aten.ge)
"""True (or false) for values below the threshold only."""

CLAMPS = (aten.clamp, aten.clamp_min, aten.clamp_max, aten.relu)

COMPARISONS = (aten.eq, aten.ne, aten.le, aten.gt, *STRICT_BELOW)


def distinct(values: Tensor) -> Tensor:
    """The different entries of a tensor, sorted."""
    found: Tensor = torch.unique(values)
    return found


def compared_with(node: fx.Node, source: fx.Node) -> set[int]:
    """The integers that an op compares `source` with; and their neighbours, unless for equality."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in COMPARISONS or len(node.args) < 2 or node.args[0] is not source:
        return set()
    number: Any = node.args[1]
    if not isinstance(number, (int, float)) or number != int(number):
        return set()
    near = (0,) if packet in (aten.eq, aten.ne) else (-1, 0, 1)
    return {int(number) + n for n in near}


def activate(
    node: fx.Node,
    state: Any,
    states: Mapping[fx.Node, Any],
    runs: Sequence[SampleRun],
    active: Sequence[SampleRun],
) -> None:
    """Change the result of a comparison or clamp that is the same everywhere in every run.

    Args:
        node: any op, after all runs ran it.
        state: its state by the rules.
        states: of the nodes before it.
        runs: all runs of a trial.
        active: the runs in which the result is changed.
    """
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in (*COMPARISONS, *CLAMPS) or not _is_inert(node, runs):
        return
    sides = [a for a in node.args[:2] if isinstance(a, fx.Node) and not is_size(a)]
    if not isinstance(state, (Samples, Mixed)) or getattr(state, "uniform", False):
        return
    if any(map(is_integer, sides)) and _reaches_index(node):
        return
    batched = [n for n in sides if states[n] != STATIC]
    for run in active:
        if not run.is_known(node):
            continue
        if packet in CLAMPS:
            _leave_out(node, sides[0], states, run)
        elif len(batched) == 1:
            _move_threshold(node, batched[0], state, states, run)
        elif isinstance(state, Samples) and node not in run.parts:
            whole = run.whole[node]
            generator = torch.Generator().manual_seed(whole.numel())
            chosen = torch.rand(whole.shape, generator=generator) < 0.5
            run.whole[node] = chosen.to(whole.device)


def _is_inert(node: fx.Node, runs: Sequence[SampleRun]) -> bool:
    values = [run.whole[node] for run in runs if run.is_known(node)]
    seen = {x.item() for v in values if v.numel() for x in v.aminmax()}
    return len(seen) == 1


def _reaches_index(node: fx.Node) -> bool:
    """Whether integers that are computed from a comparison are used as indices."""
    todo, known = [node], {node}
    while todo:
        source = todo.pop()
        for user in source.users:
            if is_integer(source) and is_index(user, source):
                return True
            if user not in known and not any(map(is_inexact, tensors_of(user))):
                known.add(user)
                todo.append(user)
    return False


def _leave_out(
    node: fx.Node, source: fx.Node, states: Mapping[fx.Node, Any], run: SampleRun
) -> None:
    """Let a clamp return its operand; relu, which clamps at 0, the operand around 0."""
    try:
        whole = run.whole_value(source)
        middle = whole.median() if node.target.overloadpacket is aten.relu else 0  # type: ignore[union-attr]
        parts = [
            run.part_value(states, n, source) - middle for n in range(len(run.parts.get(node, ())))
        ]
        whole = whole - middle  # (a new tensor: what is written to it later stays apart)
    except FAILURES:
        return
    run.whole[node] = whole
    if parts:
        run.parts[node] = parts


def _move_threshold(
    node: fx.Node, moved: fx.Node, state: Any, states: Mapping[fx.Node, Any], run: SampleRun
) -> None:
    """Compare `moved` with one of its middle values instead, in all samples and in each slice."""
    try:
        values = run.whole_value(moved)
        threshold = _middle(values, node, moved, exact=isinstance(state, Samples))
        if threshold is None:
            return
        again = partial(_compare_again, node, moved, threshold)
        whole = again(values)
        parts = [
            again(run.part_value(states, n, moved)) for n in range(len(run.parts.get(node, ())))
        ]
    except FAILURES:
        return
    run.whole[node] = whole
    if parts:
        run.parts[node] = parts


def _middle(values: Tensor, node: fx.Node, moved: fx.Node, *, exact: bool) -> Any:
    """A threshold that divides the values; None if there is none."""
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    different = distinct(values[values.isfinite()])
    at = len(different) // 2
    if not at:
        return None
    if packet in (aten.eq, aten.ne):
        return different[at].item() if exact or not is_inexact(values) else None
    if is_inexact(values):  # between two values: slices may round differently
        return (different[at - 1].item() + different[at].item()) / 2
    below = (packet in STRICT_BELOW) == (node.args[0] is moved)
    return different[at if below else at - 1].item()


def _compare_again(node: fx.Node, moved: fx.Node, threshold: Any, value: Tensor) -> Tensor:
    target: Any = getattr(torch, node.target.overloadpacket.__name__)  # type: ignore[union-attr]
    others = [n for n in node.args[:2] if isinstance(n, fx.Node) and n is not moved]
    shape = tensors_of(others[0])[0].shape if others and not is_size(others[0]) else ()
    other = torch.full(shape, threshold, dtype=value.dtype, device=value.device)
    found: Tensor = target(value, other) if node.args[0] is moved else target(other, value)
    return found
