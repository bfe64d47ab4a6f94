"""Text that would run if it got out of its comment, its literal or its name; and stages made of it.

`SENTINEL` is a name of Python's builtins within `nothing_runs`: a call of it anywhere is found.
"""

from __future__ import annotations

import builtins
import keyword
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from autopipe.passes.ir.phased import StagePhases
from tests.support.programs import CPU

SENTINEL = "ESCAPED"

LINE_ENDS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
"""What Python, or `str.splitlines`, takes for the end of a line."""

INVISIBLE = [
    *("\0", "\x08", "\x1a", "\x1b[31m", "\x7f"),
    *("\u200b", "\u202e", "\u2066", "\ufeff", "\udc80"),
]
"""Control characters, marks of direction, and half of a pair of surrogates."""

QUOTES = [*"\"'\\#{})];`", '"""', "'''", "\\\n", "%s", "\\N{DASH}"]

CALLS = [f"{SENTINEL}.append(1)", f"    {SENTINEL}.append(1)", f"); {SENTINEL}.append(1)  #"]

LETTERS = [*"a_7 éﬁ𝐱٣中", "# COUNTER: 3", "# File: e.py:1 in f", ":3 in "]

WORDS = [
    *(*keyword.kwlist, *keyword.softkwlist),
    *("args", "batch_size", "compute", "ctx", "device", "inf", "m", "nan", "results", "run"),
    *("torch", "self", "kit", "index", "op", "draw", "default", "print", "exec", "slice"),
    *("__class__", "__debug__", "__import__", "_", "x_1", "x_01", "x", "forward", "F_0_b2"),
]
"""Words of Python and of generated programs."""


def text(rng: random.Random) -> str:
    """Any text; often one that would run."""
    parts = [*LINE_ENDS, *INVISIBLE, *QUOTES, *CALLS, *LETTERS, *WORDS]
    return "".join(rng.choice(parts) for _ in range(rng.randrange(6)))


def line(rng: random.Random) -> str:
    """A line of source without a line feed, as `linecache` holds it."""
    return f"y = f(x)  # {text(rng)}".replace("\n", " ")


def trace(rng: random.Random) -> str:
    """A frame of a stack trace, with a file, a function and a line of code of any text."""
    return f'  File "{text(rng)}", line {rng.randrange(99)}, in {text(rng)}\n    {line(rng)}\n'


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Check that nothing calls the sentinel within this."""
    escaped: list[int] = []
    setattr(builtins, SENTINEL, escaped)
    try:
        yield
    finally:
        delattr(builtins, SENTINEL)
    assert escaped == []


def stage_of(
    calls: Sequence[tuple[Any, tuple[Any, ...], Mapping[str, Any], str, str | None]],
    inputs: Sequence[str] = ("x",),
) -> StagePhases:
    """A stage of one forward: each op reads tensors by their position.

    Args:
        calls: (op, args, kwargs, name of the node, stack trace). A `Tensor` of one integer among
            the arguments stands for the tensor at that position: the inputs, then the results.
        inputs: names of what the stage receives.

    Returns:
        A stage that returns all results.
    """
    graph = fx.Graph()
    graph.placeholder("ctx").name = "the runtime's"
    values = []
    for i, name in enumerate(inputs):
        values.append(graph.placeholder(f"input_{i}"))
        values[-1].meta["val"] = torch.empty(2, 3)
        values[-1].name = name
    phase_of = {}

    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return values[int(value)]
        return type(value)(map(mapped, value)) if type(value) in (list, tuple) else value

    for target, args, kwargs, name, stack in calls:
        node = graph.call_function(target)
        node.args, node.kwargs = mapped(args), {k: mapped(v) for k, v in kwargs.items()}
        node.meta = {"val": torch.empty(2, 3), "stack_trace": stack}
        node.name = name
        phase_of[name] = "F"
        values.append(node)
    graph.output(tuple(values[len(inputs) :]))
    returns = tuple(n.name for n in values[len(inputs) :])
    return StagePhases(
        index=0,
        graph=graph,
        phase_of=phase_of,
        saved=(),
        state=(),
        receives=tuple(inputs),
        tangents=(),
        returns=returns,
        updates=(),
        own_grads=(),
        sent_grads=(),
        draws=(),
        device=CPU,
    )
