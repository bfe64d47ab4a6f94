"""Checks of tensor values that a trace cannot make: ``if labels.max() >= n: raise ...``.

A trace has no values, so a branch that depends on one cannot be taken. But a check has only one way
on: the other one raises, and ends the call. As long as no such error is raised, a model with the
check and one without it compute the same. So a trace goes the way that does not raise, and the user
is told that the pipeline does not make the check.

A branch is a check if its statement in the source is an ``assert``, or an ``if`` of which one side
ends in ``raise`` after nothing but assignments and calls (which build a message, or write a log).
Nobody may catch what it raises: it stands in no ``try`` with handlers, and neither do the calls
that lead to it. The source is believed only if it compiles to the code that runs.
"""

from __future__ import annotations

import ast
import functools
import linecache
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipe.errors import CaptureError
from autopipe.passes._torch import ASSERT, is_traced
from autopipe.passes.graph import is_own_file, is_user_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import CodeType, FrameType

    from .noted import Noted

READS_VALUES: frozenset[Any] = frozenset(
    {Tensor.__bool__, torch.equal, Tensor.equal, torch.allclose, Tensor.allclose, ASSERT}
)
"""Functions that turn the values of tensors into an answer."""

Position = tuple[int | None, int | None, int | None, int | None]
"""First line, last line, first column, last column; as Python's compiler counts them."""

COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq, ast.Is, ast.IsNot)
CHOICES = (ast.NamedExpr, ast.IfExp, ast.Lambda, ast.Await, ast.Yield, ast.YieldFrom)
"""Expressions that do more than to compute the value of a test."""

CATCHING = frozenset({"suppress", "raises", "assertRaises"})
"""Names of context managers that end errors."""


class Branches:
    """Branches of a forward that depend on the values of tensors."""

    def __init__(self) -> None:
        self._failed: str | None = None

    def decide(
        self,
        function: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        frame: FrameType,
        noted: Noted,
        call: Callable[..., Any],
    ) -> Any:
        """Call a function that turns values into an answer, or answer so that a check passes.

        Args:
            function: one of `READS_VALUES`.
            args, kwargs: its arguments.
            frame: the caller.
            noted: is told of the check.
            call: calls a function with its arguments.
        """
        if not any(isinstance(x, Tensor) and is_traced(x) for x in args):
            return call(function, *args, **kwargs)  # the values are known
        answer = not _is_caught(frame) if function is ASSERT else answer_of_check(frame)
        if answer is not None and (answer or function is not ASSERT):
            noted.note_check(line_of_check(frame))
            return None if function is ASSERT else answer
        try:
            return call(function, *args, **kwargs)
        except Exception:
            self._failed = line_of_check(frame)
            raise

    def refuse_caught(self) -> None:
        """Refuse a forward that went on after a branch that could not be traced.

        Raises:
            CaptureError: it caught the error, and computed something else instead.
        """
        if self._failed is not None:
            raise CaptureError(
                "control flow that depends on the values of tensors cannot be captured",
                source=self._failed,
                found="the forward catches the error, and goes on without the branch",
                remedy="compute both branches and select with torch.where, or decide outside of the"
                " model and pass the decision in as a Python value; a check that only raises or"
                " asserts may stay (not in a try)",
            )


def answer_of_check(frame: FrameType) -> bool | None:
    """What a condition must be for a check to pass.

    Args:
        frame: it is about to branch by the value of a tensor.

    Returns:
        The answer; None if the branch is no check, or an error of it would be caught.
    """
    source = _source(frame)
    if source is None or sys.version_info < (3, 11):  # which tells no columns
        return None
    positions: list[Position] = [*frame.f_code.co_positions()]
    n = frame.f_lasti // 2
    position = positions[n]
    if position in source.statements:  # 3.11: the jump after a call; the call comes before it
        position = positions[n - 1]
    answer = source.answers.get(position)
    return None if answer is None or _is_caught(frame) else answer


def line_of_check(frame: FrameType) -> str:
    """The line of the user's code that makes the check, or that calls the function which does.

    Args:
        frame: it makes the check.
    """
    caller: FrameType | None = frame
    while caller is not None and not is_user_file(caller.f_code.co_filename):
        caller = caller.f_back
    caller = caller or frame
    return f"{caller.f_code.co_filename}:{caller.f_lineno}"


def _is_caught(frame: FrameType) -> bool:
    """Whether an error would be caught before it leaves the model's forward."""
    current: FrameType | None = frame
    while current is not None and not is_own_file(current.f_code.co_filename):
        if current is frame or is_user_file(current.f_code.co_filename):
            source = _source(current)
            if source is None or any(current.f_lineno in lines for lines in source.caught):
                return True
        current = current.f_back
    return False


# ------------------------------------------------------------------------------------- the source


@dataclass
class _Source:
    """What the source of a file tells.

    Attributes:
        answers: position of a condition → what it must be for its check to pass.
        statements: positions of the statements that branch.
        caught: lines in which errors are caught.
        codes: the compiled functions, by name and first line.
    """

    answers: dict[Position, bool] = field(default_factory=dict)
    statements: set[Position] = field(default_factory=set)
    caught: list[range] = field(default_factory=list)
    codes: dict[tuple[str, int], list[CodeType]] = field(default_factory=dict)


def _source(frame: FrameType) -> _Source | None:
    """The source of the function of a frame; None if there is none, or it is another one's."""
    code = frame.f_code
    text = "".join(linecache.getlines(code.co_filename, frame.f_globals))
    found = _parsed(text) if text else None
    if found is None:
        return None
    alike = found.codes.get((code.co_name, code.co_firstlineno), ())
    return found if any(_is_same(code, other) for other in alike) else None


def _is_same(a: CodeType, b: CodeType) -> bool:
    same = a.co_code == b.co_code and a.co_names == b.co_names
    return same and (sys.version_info < (3, 11) or [*a.co_positions()] == [*b.co_positions()])


@functools.lru_cache(maxsize=16)
def _parsed(text: str) -> _Source | None:
    """What a source tells; None if it cannot be compiled."""
    try:
        tree = ast.parse(text)
        code = compile(text, "<source>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    source = _Source()
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Assert):
            source.answers.update(_answers(statement.test, True))
            source.statements.add(_span(statement))
        elif isinstance(statement, ast.If):
            source.statements.add(_span(statement))
            if _only_raises(statement.body):
                source.answers.update(_answers(statement.test, False))
            elif _only_raises(statement.orelse):
                source.answers.update(_answers(statement.test, True))
        elif _catches(statement):
            body: list[ast.stmt] = statement.body  # type: ignore[attr-defined]
            source.caught.append(range(body[0].lineno, (body[-1].end_lineno or 0) + 1))
    codes = [code]
    while codes:
        current = codes.pop()
        source.codes.setdefault((current.co_name, current.co_firstlineno), []).append(current)
        codes += [c for c in current.co_consts if isinstance(c, type(code))]
    return source


def _answers(test: ast.expr, wanted: bool) -> dict[Position, bool]:
    """For each condition of a test what it must be for the test to be as wanted."""
    if any(isinstance(n, CHOICES) for n in ast.walk(test)):
        return {}
    return {_span(leaf): answer for leaf, answer in _leaves(test, wanted)}


def _leaves(test: ast.expr, wanted: bool) -> Iterator[tuple[ast.expr, bool]]:
    if isinstance(test, ast.BoolOp):
        for part in test.values:
            yield from _leaves(part, wanted)
    elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _leaves(test.operand, not wanted)
    elif not isinstance(test, ast.Compare) or all(isinstance(o, COMPARISONS) for o in test.ops):
        yield test, wanted


def _span(node: ast.expr | ast.stmt) -> Position:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _only_raises(body: Sequence[ast.stmt]) -> bool:
    """Whether statements raise an error, after assignments and calls at most."""
    if not body or not isinstance(body[-1], ast.Raise):
        return False
    plain = (ast.Assign, ast.AnnAssign, ast.Expr)
    return all(isinstance(s, plain) for s in body[:-1]) and not any(
        isinstance(n, (ast.Await, ast.Yield, ast.YieldFrom)) for s in body for n in ast.walk(s)
    )


def _catches(statement: Any) -> bool:
    """Whether a statement may end an error that arises in its body."""
    if isinstance(statement, (ast.With, ast.AsyncWith)):
        names = {
            getattr(n, "attr", getattr(n, "id", ""))
            for item in statement.items
            for n in ast.walk(item.context_expr)
        }
        return bool(names & CATCHING)
    return bool(getattr(statement, "handlers", ())) or _leaves_finally(statement)


def _leaves_finally(statement: Any) -> bool:
    """Whether a ``finally`` returns, or leaves a loop: that ends an error, too."""
    exits = (ast.Return, ast.Break, ast.Continue)
    final = getattr(statement, "finalbody", ())
    return any(isinstance(n, exits) for s in final for n in ast.walk(s))
