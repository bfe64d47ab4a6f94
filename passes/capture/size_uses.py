"""Record what a model's own code does with symbolic sizes while it is traced."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor

from autopipe.passes._torch import free_unbacked_symbols
from autopipe.passes.graph import is_user_file
from autopipe.passes.one_at_a_time import replaced
from autopipe.passes.python_state import answer_of_check, check_remark, line_of_check

from .symbolic_dims import NamedLengths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .passed_numbers import PassedNumbers


@dataclass
class SizeUses:
    """How the model's own code used symbolic sizes while it was traced.

    Attributes:
        concretized: lines (``file:line``) that turned a symbolic size into a Python integer, which
            fixes it.
        conditions: (condition on sizes, its value) for each condition that was evaluated.
        named: the lengths of the trace.
        checks: remarks on checks of tensors' values that were passed over.
        fixing_vmaps: lines of vmaps that fixed a symbolic size.
    """

    concretized: list[str] = field(default_factory=list)
    conditions: list[tuple[Any, bool]] = field(default_factory=list)
    named: NamedLengths = field(default_factory=lambda: NamedLengths((), ()))
    checks: dict[str, None] = field(default_factory=dict)
    fixing_vmaps: list[str] = field(default_factory=list)


@contextmanager
def record_size_uses(numbers: PassedNumbers) -> Iterator[SizeUses]:
    """Record what the model's own code does with symbolic sizes: len(x), range(n), n == 3.

    Args:
        numbers: arguments without a value, which decide branches.
    """
    sizes = SizeUses()

    def recording(original: Any, size_of: Callable[..., Any]) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(2)
            if is_user_file(caller.f_code.co_filename):
                size = size_of(*args, **kwargs)
                if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
                    sizes.concretized.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
            return original(*args, **kwargs)

        return recorded

    def first_size(x: Tensor) -> Any:
        return x.shape[0] if x.ndim else None

    def size_along(x: Tensor, dim: int = 0) -> Any:
        return x.shape[dim]

    to_bool: Any = torch.SymBool.__bool__

    def recorded_bool(condition: torch.SymBool) -> bool:
        expr, caller = condition.node.expr, sys._getframe(2)
        if free_unbacked_symbols(condition):  # a value of a tensor
            answer = numbers.answer(condition)
            if answer is not None:
                return answer
            answer = answer_of_check(caller)
            if answer is not None:
                sizes.checks[check_remark(line_of_check(caller))] = None
                return answer
        value: bool = to_bool(condition)
        if is_user_file(caller.f_code.co_filename):
            sizes.conditions.append((condition, value))
            if value and isinstance(expr, sympy.Eq):  # n == 3
                sizes.concretized.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
        return value

    with ExitStack() as stack:
        for owner, name, size_of in (
            (Tensor, "__len__", first_size),
            (Tensor, "__iter__", first_size),
            (Tensor, "unbind", size_along),
            (torch, "unbind", size_along),
            (torch.SymInt, "__index__", lambda size: size),
        ):
            replacement = recording(getattr(owner, name), size_of)
            stack.enter_context(replaced(owner, name, replacement))
        stack.enter_context(replaced(torch.SymBool, "__bool__", recorded_bool))
        yield sizes
