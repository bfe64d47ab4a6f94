"""Exceptions in generated code: where they happened, by hand-written code of the same form."""

from __future__ import annotations

import weakref

import pytest
import torch

from autopipe.errors import InputError, StageError
from autopipe.runtime.failure import stage_error
from autopipe.runtime.load import load_source

PROGRAM = """
def F_1_b2(ctx, args):
    x, = args
    # File: model.py:7 in forward, code: y = x.relu()
    relu: "f32[2]" = x + 1

    # File: model.py:8 in forward, code: y = y / 0
    div: "f32[2]" = broken(relu)
    return [div]

def forward_1(run, m, compute):
    results = compute(None, [run])

def device_1_forward(run):
    forward_1(run, 3, F_1_b2)
"""
NAMES, FILENAME = load_source(PROGRAM)


def raised(error: Exception, argument: object = 0) -> Exception:
    """What the user gets if the second node raises."""

    def broken(value: object) -> None:
        raise error

    NAMES["broken"] = broken
    try:
        NAMES["device_1_forward"](argument)
    except Exception as caught:
        return stage_error(caught, FILENAME, "forward")
    raise AssertionError("nothing was raised")


def test_stage_micro_batch_phase_node_and_source_are_named() -> None:
    found = raised(ZeroDivisionError("by zero\nand more"))
    assert isinstance(found, StageError)
    assert (found.stage, found.microbatch, found.phase) == (1, 3, "F")
    assert (found.node, found.source) == ("div", "model.py:8")
    assert str(found).startswith("stage 1, micro-batch 3 failed: ZeroDivisionError: by zero")
    assert "and more" not in str(found)


class HostileError(Exception):
    """Its text cannot be made."""

    def __str__(self) -> str:
        raise ZeroDivisionError("while the text was made")

    __repr__ = __str__


def test_an_exception_without_a_text_is_still_located() -> None:
    error = HostileError()
    found = raised(error)
    assert isinstance(found, StageError)
    assert (found.stage, found.microbatch, found.node) == (1, 3, "div")
    assert "failed: HostileError: (no text: its __str__ raised ZeroDivisionError)" in str(found)


def test_what_an_exception_says_is_one_line_of_text() -> None:
    found = raised(RuntimeError("\n\x1b[2Jcleared" + "!" * 100_000))
    assert "failed: RuntimeError: \\x1b[2Jcleared!" in str(found)
    assert {c for c in str(found) if not c.isprintable()} == {"\n"}
    assert len(str(found)) < 1000


@pytest.mark.parametrize(
    "line",
    ["    x = str('    # File: evil.py:3 in f')", "    # a comment # File: evil.py:3 in f"],
)
def test_only_a_comment_by_itself_names_the_source(line: str) -> None:
    program = PROGRAM.replace("    div:", f"{line}\n    div:")
    names, filename = load_source(program)
    names["broken"] = lambda value: 1 / 0
    with pytest.raises(ZeroDivisionError) as caught:
        names["device_1_forward"](0)
    found = stage_error(caught.value, filename, "forward")
    assert isinstance(found, StageError)
    assert (found.source, found.node) == ("model.py:8", "div")


def test_errors_of_autopipe_stay_as_they_are() -> None:
    error = InputError("wrong")
    assert raised(error) is error


def test_outside_of_generated_code_the_direction_is_named() -> None:
    found = stage_error(RuntimeError(), FILENAME, "backward")
    assert isinstance(found, StageError)
    assert str(found).startswith("the backward failed: RuntimeError\n")
    assert (found.stage, found.microbatch, found.node) == (None, None, None)


def test_the_frames_keep_no_tensors() -> None:
    computed: list[weakref.ref[torch.Tensor]] = []

    class Input:
        def __add__(self, other: int) -> torch.Tensor:
            tensor = torch.zeros(3)
            computed.append(weakref.ref(tensor))
            return tensor

    error = ValueError("no")
    found = raised(error, Input())
    assert isinstance(found, StageError)
    assert error.__traceback__ is not None  # which holds the frame that has computed the tensor
    assert [ref() for ref in computed] == [None]
