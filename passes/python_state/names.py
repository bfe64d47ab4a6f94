"""The names by which some code can reach attributes and variables."""

from __future__ import annotations

import dis
import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import CodeType

WHOLE = frozenset({"vars", "__dict__", "asdict", "astuple", "attrgetter", "__getattribute__"})
"""Names of what reads attributes that the code does not name."""

BY_NAME = frozenset({"getattr", "hasattr"})
"""Functions whose second argument is a name."""

CALLS = {"PRECALL"} if "PRECALL" in dis.opmap else {"CALL", "CALL_FUNCTION"}
"""Instructions before which a function and its arguments are on the stack."""


COMPARISONS = {"IS_OP", "COMPARE_OP", "CONTAINS_OP"}
HARMLESS = {"PRECALL", "CACHE", "BUILD_TUPLE", "BUILD_LIST", "BUILD_SET", "PUSH_NULL"}
"""Instructions between a type and what it is compared with."""

TENSORS = frozenset({"Tensor", "Parameter"})

JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs})


@functools.cache
def names_in(code: CodeType) -> set[str]:
    """Names of attributes and variables that some code reads, and strings, which may be names.

    Args:
        code: of a function.
    """
    texts = {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    return {*(set(code.co_names) - _only_set(code)), *code.co_freevars, *texts}


@functools.cache
def global_names(code: CodeType) -> set[str]:
    """Names of the global variables that some code reads or sets; attributes are none.

    Args:
        code: of a function.
    """
    return {
        step.argval
        for step in dis.get_instructions(code)
        if "GLOBAL" in step.opname or step.opname in {"LOAD_NAME", "STORE_NAME"}
    }


def _only_set(code: CodeType) -> set[str]:
    """Attributes that some code sets and never reads: ``self.last = x``."""
    stored: set[str] = set()
    others: set[str] = set()
    for step in dis.get_instructions(code):
        if isinstance(step.argval, str):
            (stored if step.opname == "STORE_ATTR" else others).add(step.argval)
    return stored - others


@functools.cache
def reads_unnamed(code: CodeType) -> bool:
    """Whether some code may read attributes that it does not name: ``getattr(x, f"scale_{i}")``.

    Args:
        code: of a function.
    """
    if WHOLE.intersection(code.co_names):
        return True
    wanted = sum(
        step.opname.startswith("LOAD_") and step.argval in BY_NAME
        for step in dis.get_instructions(code)
        if isinstance(step.argval, str)
    )
    constant, calls = _calls_by_name(code) if wanted else (0, 0)
    return wanted > constant or calls > constant  # a branch may have a copy of the call


@functools.cache
def compares_objects(code: CodeType) -> bool:
    """Whether some code may tell whether two objects are the same: ``a is b``, ``id(a)``.

    Args:
        code: of a function.
    """
    if {"id", "is_", "is_not"}.intersection(code.co_names):
        return True
    before = ""
    for step in dis.get_instructions(code):
        if step.opname == "IS_OP" and before != "LOAD_CONST":  # ``is None`` compares no arguments
            return True
        before = step.opname
    return False


@functools.cache
def compares_types(code: CodeType) -> bool:
    """Whether some code compares the type of an object with a tensor's: ``type(x) is Tensor``.

    Args:
        code: of a function.
    """
    has_type = named = False
    before = ""
    for step in dis.get_instructions(code):
        if step.argval == "__class__" or (
            step.opname in ("CALL", "CALL_FUNCTION") and before == "type"
        ):
            has_type, named = True, False
        elif step.opname.startswith("LOAD_"):
            named |= has_type and step.argval in TENSORS
        elif step.opname in COMPARISONS:
            if has_type and named:
                return True
            has_type = False
        elif step.opname not in HARMLESS:
            has_type = False
        if step.opname == "LOAD_GLOBAL":
            before = step.argval
    return False


def _calls_by_name(code: CodeType) -> tuple[int, int]:
    """How many calls of `BY_NAME` have a name that is a constant, and how many there are.

    Some may be overlooked.
    """
    constant = calls = 0
    stack: list[object] = []  # what the interpreter's stack holds: a `str` is a constant
    arriving: dict[int, list[object]] = {}  # what it holds at the targets of jumps
    for step in dis.get_instructions(code):
        if step.is_jump_target:
            stack = arriving.pop(step.offset, stack)
        if step.is_jump_target or step.opcode in JUMPS:  # a branch: it is not known what it leaves
            stack = [x if x is BY_NAME else None for x in stack]
        if step.opname in CALLS:
            count = step.arg or 0
            called, given = stack[-count - 2 : -count], stack[-count:]
            if any(x is BY_NAME for x in called):
                calls += 1
                constant += count > 1 and isinstance(given[1], str)
        if step.opcode in JUMPS:
            arriving[step.argval] = _resized(stack, step, jump=True)
        stack = _resized(stack, step, jump=False)
        if not stack:
            continue
        stack[-1] = None
        if step.opname == "LOAD_CONST":
            stack[-1] = step.argval
        elif step.opname.startswith("LOAD_") and step.argval in BY_NAME:
            stack[-1] = BY_NAME
    return constant, calls


def _resized(stack: list[object], step: dis.Instruction, *, jump: bool) -> list[object]:
    """The stack with as many entries as there are after an instruction."""
    change = dis.stack_effect(step.opcode, step.arg, jump=jump)
    return [*stack, *[None] * change] if change > 0 else stack[: len(stack) + change]
