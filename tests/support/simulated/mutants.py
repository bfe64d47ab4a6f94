"""Changed copies of the runtime's functions: in each, one thing that orders work is missing.

A mutant is found by reading the source, so a wait that is added tomorrow has its mutant, too.

- a statement that waits, or records a use, is left out;
- a recorded event is one that was reached long ago;
- work stays on the current stream where it should go to another;
- a copy that the host has to wait for is not waited for;
- the streams of the forward's caller are forgotten in the backward.

Of what replays graphs: what is copied, zeroed, seeded or handed over is not; what is checked is
taken as right.
"""

from __future__ import annotations
import __future__

import ast
import copy
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .streams import Clock

MODULES = (
    "autopipe.runtime.transfer",
    "autopipe.runtime.caller_streams",
    "autopipe.runtime.backpressure",
    "autopipe.runtime.executor",
    "autopipe.runtime.offload",
    "autopipe.compiled",
    "autopipe.pipeline_call",
)
STATEMENTS = {
    *("wait_event", "wait_stream", "record_use", "synchronize", "wait_for", "wait_on_host"),
    *("use", "wait"),
}
"""Methods whose call is left out, or replaced by its argument where its result is used."""

GRAPH_MODULES = tuple(
    f"autopipe.runtime.graphs.{name}"
    for name in ("phase_graph", "stage_state", "kept_sums", "slots", "stage_graphs")
)
LEFT_OUT = {
    *("copy_", "zero_", "manual_seed", "register_generator_state", "refresh", "hand_over"),
    *("give_back", "clear"),
}
TAKEN_AS_RIGHT = {"claim", "is_as_before", "owns", "has"}

RECEIVERS = {"backpressure", "_backpressure", "ready", "marks", "caller"}
"""For `wait` and `use`, which other objects have too."""


class Reached:
    """An event that was reached before anything happened."""

    clock = Clock()
    time = 0.0
    stream = None

    def synchronize(self) -> None:
        pass


@dataclass(frozen=True)
class Mutant:
    """One changed function.

    Attributes:
        name: module, line and what was changed.
        owner: the module or class that has the function.
        attribute: its name there.
        function: the changed one.
    """

    name: str
    owner: Any
    attribute: str
    function: Any


def mutants() -> Iterator[Mutant]:
    """All mutants of the runtime without graphs."""
    yield from _mutants(MODULES, _change)


def graph_mutants() -> Iterator[Mutant]:
    """All mutants of what captures and replays graphs."""
    yield from _mutants(GRAPH_MODULES, _graph_change)


Change = Callable[[ast.AST], ast.AST | None]
"""What a node becomes in its mutant; None: it has none."""


def _mutants(modules: Iterable[str], change: Change) -> Iterator[Mutant]:
    for name in modules:
        module = importlib.import_module(name)
        for owner, attribute, function in _functions(module):
            yield from _of_function(module, owner, attribute, function, change)


def _functions(module: ModuleType) -> Iterator[tuple[Any, str, Any]]:
    for attribute, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield module, attribute, value
        elif inspect.isclass(value):
            for name, method in vars(value).items():
                if inspect.isfunction(method) and method.__code__.co_filename == module.__file__:
                    yield value, name, method


def _of_function(
    module: ModuleType, owner: Any, attribute: str, function: Any, change: Change
) -> Iterator[Mutant]:
    source = textwrap.dedent(inspect.getsource(function))
    first = function.__code__.co_firstlineno
    tree = ast.parse(source)
    count = sum(1 for node in ast.walk(tree) if change(node) is not None)
    for i in range(count):
        changer = _Changer(i, change)
        changed = ast.fix_missing_locations(changer.visit(copy.deepcopy(tree)))
        code = compile(
            changed, "<mutant>", "exec", __future__.annotations.compiler_flag, dont_inherit=True
        )
        names: dict[str, Any] = {}
        scope = {**vars(module), "Reached": Reached, "nullcontext": nullcontext}
        exec(code, scope, names)
        line = first + changer.line - 1
        yield Mutant(
            f"{module.__name__.rpartition('.')[2]}:{line} {changer.text}",
            *(owner, attribute, names[attribute]),
        )


def _change(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.keyword) and node.arg == "non_blocking":
        return ast.keyword("non_blocking", ast.Constant(True))
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name) and node.func.id == "CallerStreams" and node.args[1:]:
        return ast.Call(node.func, node.args[:1], [])
    if not isinstance(node.func, ast.Attribute):
        return None
    method, receiver = node.func.attr, node.func.value
    name = getattr(receiver, "attr", getattr(receiver, "id", ""))
    if method == "record_event":
        return ast.Call(ast.Name("Reached", ast.Load()), [], [])
    if method == "use_stream":
        return ast.Call(ast.Name("nullcontext", ast.Load()), [], [])
    if method not in STATEMENTS:
        return None
    if method in ("wait", "use", "wait_for", "wait_on_host") and name not in RECEIVERS:
        return None
    return ast.Constant(None)


def _graph_change(node: ast.AST) -> ast.AST | None:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return None
    method, receiver = node.func.attr, node.func.value
    if method in LEFT_OUT:
        return ast.Constant(None)
    if method in TAKEN_AS_RIGHT:
        return ast.Constant(True)
    if method == "clone":
        return receiver
    if method == "drawing_from":
        return ast.Call(ast.Name("nullcontext", ast.Load()), [], [])
    return None


class _Changer(ast.NodeTransformer):
    """Changes the i-th node that has a mutant, in the order of `ast.walk`."""

    def __init__(self, index: int, change: Change) -> None:
        self._left, self._change = index, change
        self.line, self.text = 0, ""

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Module):
            found = [n for n in ast.walk(node) if self._change(n) is not None][self._left]
            self.line, self.text = found.lineno, ast.unparse(found)  # type: ignore[attr-defined]
            self._target = found
        if node is self._target:
            return self._change(node)
        return self.generic_visit(node)
