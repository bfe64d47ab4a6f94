"""docs/errors.md says what is raised, class by class."""

from __future__ import annotations

import inspect
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from autopipe import errors
from tests.support.errors_page import CASES, HEAD, WARNINGS, page, raised, warned

ALL = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.AutopipeError) and kind is not errors.AutopipeError
]


def test_every_class_has_a_case() -> None:
    missing = [kind.__name__ for kind in ALL if kind not in CASES]
    assert missing == [], "add a script to CASES in tests/support/errors_page.py"
    assert set(CASES) == set(ALL)


@pytest.mark.parametrize("kind", CASES)
def test_each_case_raises_its_class_and_says_what_to_do(kind: type) -> None:
    for title, script in CASES[kind].items():
        error = raised(script)
        assert type(error) is kind, title
        if kind is not errors.VerifyError:  # a bug of ours: nothing that the user can do
            assert error.remedy or error.expected, title
        if kind in (errors.CaptureError, errors.CouplingError):
            assert error.source, title


@pytest.mark.parametrize("title", WARNINGS)
def test_warnings_stand_at_the_users_line(title: str) -> None:
    """It is that of the call; the text names the line of the model."""
    if title == "A check of values" and sys.version_info < (3, 11):
        pytest.skip("refused there: frames do not tell their columns")
    script = WARNINGS[title]
    last = len((HEAD + textwrap.dedent(script)).rstrip().splitlines())
    for line in warned(script).splitlines():
        assert line.startswith(f"train.py:{last}: UserWarning: the model's forward"), title


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="it quotes torch 2.13")
def test_the_page_is_up_to_date() -> None:
    """Else: ``python -m tests.support.errors_page > docs/errors.md``."""
    path = Path(__file__).parents[2] / "docs" / "errors.md"
    assert page() == path.read_text()
