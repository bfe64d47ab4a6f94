"""The statements that a generated program may hold: a check of the text, whatever has written it.

The text is parsed, and every statement and expression must have one of the forms below. So text of
a model that would get into a program, through an escape that was forgotten, does not run.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

import torch

from autopipe.errors import VerifyError
from autopipe.passes._torch import HigherOrderOperator, OpOverload

from .source_forms import is_constant, is_getattr, is_number, is_string, is_text, path_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

METHODS = {
    "run": {"context", "pop_saved", "receive", "return_to_caller", "save", "send", "state"}
    | {"fetch", "offload", "update_buffer"},
    "ctx": {"accumulate", "draw", "in_suggested_format", "watched", "with_grad"},
    "args": {"clear"},
    "torch": {"tensor"},
}
"""What is called besides operators and functions of the program: object → methods."""

IMPORTS = ("from math import inf, nan", "import torch", "from torch import device")

GLOBALS = frozenset({"device", "inf", "nan", "torch"})
"""What the imports define; no value may have these names."""

CALLED = frozenset({"abs", "complex", "float", "int", "max", "min", "round", "slice"})
"""Functions of Python that literals and sizes call."""

BUILTINS = CALLED | {"getattr"}
"""No value may have these names."""

ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Div, ast.Pow)
"""Operators in expressions of sizes."""

HEADS = re.compile(
    r"def (?:"
    r"(?P<ops>[FRBW]{1,3}_\d+_(?:b\d+|B\d*)(?:_\d+)?(?:_part_\d+)?)\(ctx, args\)|"
    r"(?P<stage>(?:forward|recompute|gradients|weights|backward)_\d+)\(run, m, compute\)|"
    r"(?P<device>device_\d+_(?:forward|backward|step))\(run\)"
    r"):",
    re.ASCII,
)
"""The first line of a function; its kind is the name of the group that has its name."""

ARGUMENTS = {"ops": ("ctx", "args"), "stage": ("run", "m", "compute"), "device": ("run",)}


BEGINS = re.compile(r"    [A-Za-z_]")
"""A line with which a statement may begin."""

PIECE = 50
"""Lines that are parsed at once. The tree of a whole program would keep the garbage collector busy
for longer than all the rest of the check takes."""


def check_source(source: str) -> set[str]:
    """Check that a text is a program and nothing else.

    A statement at the beginning of a line starts a new part. Parts are the header's statements,
    and functions, whose bodies are parsed piece by piece. A piece that is valid Python by itself
    leaves no bracket and no string open, so the pieces are together what Python sees.

    Args:
        source: a Python module.

    Returns:
        The names of its functions.

    Raises:
        VerifyError: the text has a control character, is no Python, or has a statement or an
            expression that programs do not hold.
    """
    text = source.replace("\n", "").replace("\t", "")
    if not text.isprintable():
        found = next(c for c in text if not c.isprintable())
        raise VerifyError("a program with a control character", found=ascii(found))
    lines = source.split("\n")
    begins = (i for i, line in enumerate(lines) if line and not line.startswith((" ", "\t", "#")))
    starts = sorted({0, *begins})
    heads = {i: HEADS.fullmatch(lines[i]) for i in starts}
    functions = {str(m[str(m.lastgroup)]) for m in heads.values() if m}
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        head = heads[start]
        if head is not None:
            function = _Function(functions, ARGUMENTS[str(head.lastgroup)])
            for first, last in _pieces(lines, start + 1, end):
                function.check(lines[first:last], first)
        else:
            (*statements,) = _parsed(lines[start:end], start).body
            for statement in statements:
                if not (ast.unparse(statement) in IMPORTS or (start == 0 and is_text(statement))):
                    raise _unknown(statement, start)
    return functions


def _pieces(lines: list[str], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut the lines of a body, where a line of the usual indentation begins with a name."""
    first = start
    for i in range(start, end):
        if i >= first + PIECE and BEGINS.match(lines[i]):
            yield first, i
            first = i
    yield first, end


def _parsed(lines: list[str], offset: int) -> ast.Module:
    try:
        return ast.parse("\n".join(lines))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise VerifyError(
            "a program that is no Python", found=f"line {offset + 1} and following: {error}"
        ) from error


def _unknown(node: ast.AST, offset: int = 0) -> VerifyError:
    return VerifyError(
        "a program holds a statement that no pass writes",
        expected="calls of operators of torch, and of methods of run and ctx",
        found=f"line {getattr(node, 'lineno', 0) + offset}: {ast.unparse(node)[:200]}",
    )


class _Function:
    """Checks the body of a function.

    Args:
        functions: the names of all functions of the program.
        arguments: of this one.
    """

    def __init__(self, functions: set[str], arguments: Sequence[str]) -> None:
        self._functions = functions
        self._known = {*arguments}
        self._operators: set[tuple[str, ...]] = set()
        self._offset = 0

    def check(self, lines: list[str], offset: int) -> None:
        """Check some of its statements, after those before them.

        Args:
            lines: with their indentation.
            offset: number of lines of the program before them.

        Raises:
            VerifyError: a statement is none that programs hold.
        """
        self._offset = offset - 1
        end = ast.dump(ast.Expr(ast.Constant(0)))
        (block,) = _parsed(["if 1:", *lines, "    0"], offset).body
        assert isinstance(block, ast.If)
        *statements, last = block.body
        if ast.dump(last) != end:  # a line that is continued: by the next piece, not by the 0
            raise _unknown(last, self._offset)
        for statement in statements:
            self._statement(statement)

    def _statement(self, s: ast.stmt) -> None:
        if isinstance(s, ast.Assign):
            self._expression(s.value)
            for target in s.targets:
                self._store(target)
        elif isinstance(s, ast.AnnAssign) and is_string(s.annotation) and s.value is not None:
            self._expression(s.value)
            self._store(s.target)
        elif isinstance(s, ast.Expr) and isinstance(s.value, ast.Call):
            self._call(s.value)
        elif isinstance(s, ast.Return) and isinstance(s.value, ast.List):
            self._expression(s.value)
        else:
            raise _unknown(s, self._offset)

    def _store(self, target: ast.expr) -> None:
        if isinstance(target, ast.Tuple):
            for each in target.elts:
                self._store(each)
        elif isinstance(target, ast.Name) and target.id not in GLOBALS | BUILTINS:
            self._known.add(target.id)
        else:
            raise _unknown(target, self._offset)

    def _expression(self, e: ast.expr) -> None:
        if isinstance(e, ast.Name):
            known = e.id in self._known or e.id in ("inf", "nan")
            valid = known or e.id in self._functions
        elif isinstance(e, (ast.List, ast.Tuple)):
            for each in e.elts:
                self._expression(each)
            valid = True
        elif isinstance(e, ast.Call) and not is_getattr(e):
            self._call(e)
            valid = True
        else:
            valid = isinstance(e, ast.Constant) or self._is_seldom(e)
        if not valid:
            raise _unknown(e, self._offset)

    def _is_seldom(self, e: ast.expr) -> bool:
        """Check an expression of another form; its parts raise errors of their own."""
        if isinstance(e, ast.UnaryOp):
            return isinstance(e.op, ast.USub) and is_number(e.operand)
        if isinstance(e, ast.BinOp):
            self._expression(e.left)
            self._expression(e.right)
            return isinstance(e.op, ARITHMETIC)
        if isinstance(e, (ast.Compare, ast.BoolOp)):
            for side in e.values if isinstance(e, ast.BoolOp) else (e.left, *e.comparators):
                self._expression(side)
            return True
        if isinstance(e, ast.Starred):
            self._expression(e.value)
            return isinstance(e.value, ast.Call)
        if isinstance(e, ast.Subscript):
            index = e.slice
            first = index.lower if isinstance(index, ast.Slice) else index
            rest = (index.upper, index.step) if isinstance(index, ast.Slice) else ()
            known = isinstance(e.value, ast.Name) and e.value.id in self._known
            return known and first is not None and is_number(first) and not any(rest)
        if isinstance(e, ast.Dict):
            for each in (*e.keys, *e.values):
                if each is None:
                    return False
                self._expression(each)
            return True
        path = path_of(e)
        if path == ["ctx", "sizes"]:
            return "ctx" in self._known
        if path[:2] == ["torch", "ops"]:
            return self._is_operator(tuple(path[2:]))
        return len(path) == 2 and path[0] == "torch" and is_constant(path[1])

    def _call(self, call: ast.Call) -> None:
        if not self._is_callable(call):
            raise _unknown(call, self._offset)
        for argument in call.args:
            self._expression(argument)
        for keyword in call.keywords:
            if keyword.arg is None and not isinstance(keyword.value, ast.Dict):
                raise _unknown(call, self._offset)
            self._expression(keyword.value)

    def _is_callable(self, call: ast.Call) -> bool:
        function = call.func
        if isinstance(function, ast.Name):
            name = function.id
            return name in CALLED | {"compute", "device"} or name in self._functions
        path = path_of(function)
        if path[:2] == ["torch", "ops"]:
            return self._is_operator(tuple(path[2:]))
        return len(path) == 2 and path[1] in METHODS.get(path[0], ())

    def _is_operator(self, path: tuple[str, ...]) -> bool:
        """Whether ``torch.ops`` has an operator of this path."""
        if path not in self._operators:
            found: Any = torch.ops
            for name in path:
                found = getattr(found, name, None)
            if not isinstance(found, (OpOverload, HigherOrderOperator)):
                return False
            self._operators.add(path)
        return True
