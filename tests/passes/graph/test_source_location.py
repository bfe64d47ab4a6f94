"""Which lines are the user's."""

from __future__ import annotations

import re
import traceback
import warnings
from pathlib import Path

import torch

import autopipe
from autopipe.passes.graph.source_location import (
    is_user_file,
    trim_to_user_frame,
    user_source_line,
    warn_at_user_line,
)
from tests.support.programs import user_line

HERE = __file__
TORCH = f"{Path(torch.__file__).parent}/nn/modules/linear.py"
OURS = str(Path(autopipe.__file__).parent)


def test_files_of_torch_and_autopipe_are_not_the_users() -> None:
    assert is_user_file(HERE)
    assert is_user_file("/home/someone/model.py")
    assert not is_user_file(TORCH)
    assert not is_user_file(f"{OURS}/api.py")
    assert not is_user_file("<autopipe program 1>")


def test_every_source_file_of_autopipe_is_ours() -> None:
    """Wherever this file's module stands among the packages."""
    root = Path(autopipe.__file__).parent
    for path in (root / "api.py", *(root / "passes").rglob("*.py")):
        assert not is_user_file(str(path))


def test_traces_end_at_the_users_innermost_frame() -> None:
    frame = '  File "{}", line {}, in forward\n    {}\n'
    user = frame.format(HERE, 3, "x = self.linear(x)")
    trace = frame.format(HERE, 1, "self(x)") + user + frame.format(TORCH, 134, "F.linear(x)")
    found = trim_to_user_frame(trace)
    assert found is not None
    assert re.findall(r'File "(.+?)", line (\d+)', found) == [(HERE, "1"), (HERE, "3")]
    assert found.rstrip().endswith("x = self.linear(x)")


def test_traces_without_a_users_frame_stay() -> None:
    trace = f'  File "{TORCH}", line 134, in forward\n'
    assert trim_to_user_frame(trace) == trace
    assert trim_to_user_frame(None) is None


def test_the_innermost_user_line() -> None:
    stack = traceback.StackSummary.from_list(
        [
            (HERE, 10, "outer", ""),
            ("/home/someone/model.py", 20, "forward", ""),
            (TORCH, 30, "forward", ""),
        ]
    )
    assert user_source_line(stack) == "/home/someone/model.py:20"
    assert user_source_line(traceback.StackSummary.from_list([(TORCH, 30, "forward", "")])) is None


def test_warnings_are_shown_at_the_users_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_at_user_line("look here")  # the line that warns
    (found,) = caught
    assert str(found.message) == "look here"
    expected = user_line(test_warnings_are_shown_at_the_users_line, "# the line " + "that warns")
    assert f"{found.filename}:{found.lineno}" == expected


def test_generated_code_is_the_users_only_if_nothing_else_is() -> None:
    def line(*files: str) -> str | None:
        return user_source_line(
            traceback.StackSummary.from_list([(f, 1, "forward", "") for f in files])
        )

    assert line("/home/someone/model.py", TORCH, "<string>") == "/home/someone/model.py:1"
    assert line("<string>", TORCH) == "<string>:1"  # python -c
    assert line("<stdin>", TORCH) == "<stdin>:1"
    assert line("/usr/lib/ipykernel.py", "<ipython-input-3-ab>") == "<ipython-input-3-ab>:1"
    assert line("<eval_with_key>.3", "<frozen importlib>", "<autopipe 1f>", TORCH) is None


def test_packages_whose_names_begin_with_torch_are_the_users() -> None:
    assert is_user_file(str(Path(torch.__file__).parent) + "vision/models/resnet.py")
