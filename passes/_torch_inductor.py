"""Compile a graph with torch's compiler "inductor": private names of torch.

`torch._inductor.compile` is its entry point for fx graphs, without Dynamo: nothing is guarded at
run time, and a call of what it returns enters no compiler.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import fx


def compiler_fake_mode() -> FakeTensorMode:
    """Create a mode for the example tensors of `compile_graph`; its environment may get symbols."""
    return FakeTensorMode(shape_env=ShapeEnv())


def mode_options(mode: str) -> dict[str, Any]:
    """The settings of inductor that `torch.compile` has for one of its modes.

    Args:
        mode: "default", "reduce-overhead", ...
    """
    import torch._inductor

    found: Any = torch._inductor.list_mode_options(mode)
    return dict(found)


def compile_graph(
    module: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[[list[Any]], Sequence[Any]]:
    """Compile a graph for inference. The caller disables gradients, autocast and modes.

    Kernels are compiled by torch's worker processes, and kept on disk in torch's cache of graphs.

    Args:
        module: returns a list of tensors; it may be changed.
        inputs: fake tensors of one `compiler_fake_mode`, and sizes of its environment.
        options: settings of inductor.

    Returns:
        A function that takes its arguments in a list, empties it, and returns the results. Several
        threads may call it at the same time.

    Raises:
        Exception: of any type: inductor cannot compile it.
    """
    import torch._inductor

    with _kernels_without_interpreter_lock():
        compiled: Any = torch._inductor.compile(module, list(inputs), options=dict(options))
    boxed = _boxed(compiled)
    if boxed is not None:
        return boxed

    def call(arguments: list[Any]) -> Sequence[Any]:
        taken = tuple(arguments)
        arguments.clear()
        results: Sequence[Any] = compiled(*taken)
        return results

    return call


CALLS_A_KERNEL = "kernel({}); Py_RETURN_NONE;"
"""What torch writes at the end of a C++ kernel's entry from Python."""

RELEASES_THE_LOCK = """
auto values = std::make_tuple({});
struct Released {{
    PyThreadState* state = PyEval_SaveThread();
    ~Released() {{ PyEval_RestoreThread(state); }}
}};
{{ Released released; std::apply(kernel, values); }}
Py_RETURN_NONE;
"""
"""The same without Python's lock meanwhile: else CPU workers would wait for one another."""


@contextmanager
def _kernels_without_interpreter_lock() -> Iterator[None]:
    """Until exit, C++ kernels are compiled and loaded such that they release Python's lock.

    (Torch's own operators release it. `torch.compile` runs kernels in one thread.)
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Bindings

    if Bindings.call_entry_function != CALLS_A_KERNEL:
        yield
        return
    Bindings.call_entry_function = RELEASES_THE_LOCK
    try:
        yield
    finally:
        Bindings.call_entry_function = CALLS_A_KERNEL


def _boxed(function: Any) -> Callable[[list[Any]], Sequence[Any]] | None:
    """The function in torch's wrappers that takes its arguments in a list, and frees them early.

    The wrappers take any number of arguments, and hold them until the end.
    """
    while isinstance(function, FunctionType) and function.__code__.co_flags & inspect.CO_VARARGS:
        function = getattr(function, "__wrapped__", None)
    found: Callable[[list[Any]], Sequence[Any]] = function
    return found if getattr(function, "_boxed_call", False) else None
