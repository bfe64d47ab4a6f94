"""Write some phases of a stage as a function: one line per op, one comment per line of the model.

Nothing is written as torch or the model spells it. Names are checked identifiers, constants are
literals, and comments have their control characters escaped, so that no line ends before its end.
"""

from __future__ import annotations

import re
from operator import getitem
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from autopipe.errors import UnsupportedError, printable
from autopipe.passes._torch import size_text
from autopipe.passes.graph import (
    Names,
    SizeExpression,
    full_size,
    is_identifier,
    literal,
    operator_path,
    quoted,
    source_line,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import sympy

    from autopipe.passes.ir import PhaseFunction, StagePhases

RESERVED = frozenset({"args", "ctx", "device", "inf", "nan", "torch"})
"""Names that a stage's function uses for other things than values."""

CONTEXT_METHODS = frozenset({"accumulate", "draw", "in_suggested_format", "watched", "with_grad"})
"""Methods of the runtime's `ctx` that a joint graph calls."""

FRAME = re.compile(r'File "(.+)", line (\d+), in (.+)')
"""A frame in a stack trace; the next line is the model's code."""


class OpLine(NamedTuple):
    """A line of the function: a value and how it is computed.

    Attributes:
        name: of the value.
        text: the expression.
        reads: names in it, in its order.
        node: what is computed.
        typed: whether the line shows the type of the value.
    """

    name: str
    text: str
    reads: tuple[str, ...]
    node: fx.Node
    typed: bool = True


def stage_function(
    stage: StagePhases,
    function: PhaseFunction,
    device: torch.device,
    name: str,
    symbols: Sequence[sympy.Symbol] = (),
) -> str:
    """Write the ops of some phases as a function ``name(ctx, args)``, which empties `args`.

    Args:
        stage: its joint graph has the ops.
        function: what it takes, computes and returns.
        device: where the function runs.
        name: of the function.
        symbols: the symbolic sizes; their values are in ``ctx.sizes``.

    Returns:
        Python source of the function.

    Raises:
        UnsupportedError: an op, or one of its arguments, has no expression in Python.
    """
    ctx, *placeholders = [n for n in stage.graph.nodes if n.op == "placeholder"]
    labels = [*stage.state, *stage.receives, *(f"grad_{n}" for n in stage.tangents)]
    label_of = dict(zip(placeholders, labels, strict=True))
    names = Names(RESERVED | {str(s) for s in symbols})
    env = {n: names.create(label_of.get(n, n.name)) for n in function.arguments}
    parameters = list(env.values())
    env[ctx] = "ctx"
    writer = OpWriter(env, stage.device, device)
    computed = set(function.nodes)
    lines = []
    for node in (*(n for n in function.gradients if n not in computed), *function.nodes):
        if node in computed:
            text, reads = writer.call(node), writer.reads(node)
            env[node] = names.create(node.name)
            lines.append(OpLine(env[node], text, reads, node))
        for i in function.gradients.get(node, ()):  # at once, so that only the sum stays alive
            text = f"ctx.accumulate({i}, {env[node]})"
            lines.append(
                OpLine(names.create("accumulate"), text, ("ctx", env[node]), node, typed=False)
            )
    returned = [env[v] if isinstance(v, fx.Node) else literal(v) for v in function.results]
    return function_text(name, symbols if writer.uses_sizes else (), parameters, lines, returned)


def function_text(
    name: str,
    symbols: Sequence[sympy.Symbol],
    parameters: Sequence[str],
    lines: Sequence[OpLine],
    returned: Sequence[str],
) -> str:
    """Write a function ``name(ctx, args)``, which empties `args`.

    Args:
        name: of the function.
        symbols: those that it reads from ``ctx.sizes``.
        parameters: names of what is in `args`.
        lines: its body.
        returned: expressions of its results.
    """
    head = [f"def {name}(ctx, args):"]
    if symbols:
        head.append(f"    {wrapped([*map(str, symbols)])} = ctx.sizes")
    if parameters:
        head += [f"    {wrapped(parameters)} = args", "    args.clear()"]
    body = [*head, *written_lines(lines, returned), f"    return [{', '.join(returned)}]"]
    return "\n".join(body) + "\n"


class OpWriter:
    """Writes nodes as expressions.

    Args:
        env: the names of nodes; later ones are added to it.
        traced: the device in the graph.
        device: the device to write instead; both have the same type.

    Attributes:
        uses_sizes: whether an expression has a symbolic size.
    """

    def __init__(
        self, env: Mapping[fx.Node, str], traced: torch.device, device: torch.device
    ) -> None:
        self._env, self._traced, self._device = env, traced, device
        self._paths: dict[Any, str] = {}
        self.uses_sizes = False

    def call(self, node: fx.Node) -> str:
        """Write the expression that computes a node.

        Raises:
            UnsupportedError: there is none.
        """
        try:
            if node.op == "call_method":
                (owner, *arguments) = node.args
                if node.target not in CONTEXT_METHODS or self._own(owner) != "ctx":
                    raise TypeError(f"a call of the method {node.target}")
                return f"ctx.{node.target}({self._listed(arguments, node.kwargs)})"
            if node.op != "call_function":
                raise TypeError(f"a node of the kind {node.op}")
            if node.target is getitem:
                owner, index = node.args
                return f"{self._literal(owner)}[{self._literal(index)}]"
            return f"{self._function(node.target)}({self._listed(node.args, node.kwargs)})"
        except TypeError as error:
            raise UnsupportedError(
                "an operator cannot be written as Python",
                node=node.name,
                source=source_line(node),
                found=str(error),
                remedy="pass it tensors, numbers, strings, dtypes, devices, or lists of these; an"
                " operator of your own must be found as torch.ops.<library>.<name>",
            ) from error

    def reads(self, node: fx.Node) -> tuple[str, ...]:
        """The names in a node's expression."""
        return tuple(self._env[n] for n in node.all_input_nodes)

    def _function(self, target: Any) -> str:
        if target is torch.tensor:
            return "torch.tensor"
        if target not in self._paths:
            self._paths[target] = operator_path(target)
        return self._paths[target]

    def _listed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Write arguments; those whose names are no identifiers of Python in a dict."""
        listed = [self._literal(a) for a in args]
        listed += [f"{k} = {self._literal(v)}" for k, v in kwargs.items() if is_identifier(k)]
        others = {k: v for k, v in kwargs.items() if not is_identifier(k)}
        return ", ".join([*listed, f"**{self._literal(others)}"] if others else listed)

    def _literal(self, value: Any) -> str:
        return literal(value, self._own)

    def _own(self, value: Any) -> str | None:
        if isinstance(value, fx.Node):
            return self._env[value]
        if isinstance(value, torch.device) and value == self._traced:
            return literal(self._device)
        if isinstance(value, SizeExpression):
            self.uses_sizes = True
            return size_text(value.expr)
        return None


def written_lines(lines: Sequence[OpLine], returned: Sequence[str]) -> Iterator[str]:
    """Write the lines: each value is freed in the line that reads it last.

    Args:
        lines: of the function.
        returned: names of values that are never freed.
    """
    last: dict[str, int] = {n: len(lines) for n in returned}
    freed: list[list[str]] = [[] for _ in lines]
    for i in range(len(lines) - 1, -1, -1):
        for name in dict.fromkeys(lines[i].reads):
            if name not in last:
                last[name] = i
                freed[i].append(name)
        if lines[i].name not in last:
            freed[i].append(lines[i].name)
    shown = ""
    for at, (line, names) in enumerate(zip(lines, freed, strict=True)):
        comment = _comment(line.node)
        if comment and comment != shown:
            yield f"    # {comment}" if at == 0 else f"\n    # {comment}"
        shown = comment
        end = f";  {' = '.join([*names, 'None'])}" if names else ""
        yield f"    {line.name}{_annotation(line)} = {line.text}{end}"


def _annotation(line: OpLine) -> str:
    """Dtype and shape of a tensor, as an annotation: ``: "f32[2, 4]"``."""
    value = line.node.meta.get("val")
    if not line.typed or not isinstance(value, Tensor):
        return ""
    dtype = getattr(value.dtype, "abbr", str(value.dtype).removeprefix("torch."))
    shape = ", ".join(str(full_size(n)) for n in value.shape)
    return f": {quoted(f'{dtype}[{shape}]')}"


def _comment(node: fx.Node) -> str:
    """The line of the model that a node comes from; "" if it is not known.

    `autopipe.runtime.failure` reads file and line from it, so no text in the name of the file may
    look like their end.
    """
    lines = (node.meta.get("stack_trace") or "").strip().split("\n")
    for at in range(len(lines) - 2, -1, -1):
        match = FRAME.fullmatch(lines[at].strip())
        if match:
            file = re.sub(r":(?=\d+ in )", r"\\x3a", match[1])
            text = f"File: {file}:{match[2]} in {match[3]}, code: {lines[at + 1].strip()}"
            return printable(text)
    return ""


def wrapped(parameters: Sequence[str]) -> str:
    """Write names to which a list is assigned, on several lines if they are many."""
    if sum(map(len, parameters)) + 2 * len(parameters) < 80:
        return ", ".join(parameters) + ("," if len(parameters) == 1 else "")
    return "(\n        " + ",\n        ".join(parameters) + ",\n    )"
