"""Forms of Python expressions that a generated program may hold: paths, numbers, constants."""

from __future__ import annotations

import ast

import torch

CONSTANTS = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)
"""Types of the attributes of `torch` that are arguments of ops."""


def is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a string, as a docstring is."""
    return isinstance(statement, ast.Expr) and is_string(statement.value)


def is_string(node: ast.AST | None) -> bool:
    """Whether an expression is a string."""
    return isinstance(node, ast.Constant) and type(node.value) is str


def path_of(e: ast.expr) -> list[str]:
    """The names in ``torch.ops.aten.add.Tensor``; empty for an expression of another form.

    ``getattr(owner, "name")`` counts as ``owner.name``.
    """
    names: list[str] = []
    while not isinstance(e, ast.Name):
        if isinstance(e, ast.Attribute):
            names.append(e.attr)
            e = e.value
        elif isinstance(e, ast.Call) and is_getattr(e):
            e, name = e.args
            names.append(ast.literal_eval(name))
        else:
            return []
    return [e.id, *reversed(names)]


def is_getattr(e: ast.Call) -> bool:
    """Whether a call is ``getattr(owner, "name")``."""
    named = isinstance(e.func, ast.Name) and e.func.id == "getattr"
    return named and len(e.args) == 2 and not e.keywords and is_string(e.args[1])


def is_number(e: ast.expr) -> bool:
    """Whether an expression is a number, maybe negative or infinite."""
    if isinstance(e, ast.UnaryOp) and isinstance(e.op, ast.USub):
        e = e.operand
    if isinstance(e, ast.Name):
        return e.id in ("inf", "nan")
    return isinstance(e, ast.Constant) and type(e.value) in (int, float)


def is_constant(name: str) -> bool:
    """Whether ``torch.name`` is a dtype, a layout or the like."""
    return isinstance(getattr(torch, name, None), CONSTANTS)
