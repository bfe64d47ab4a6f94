"""``pytest tests/passes --golden`` writes the golden files anew; look at the diff afterwards."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden"
ROOT = f"{GOLDEN.parents[1]}/"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write tests/golden/*.txt anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: `text` must be what tests/golden/name.txt holds."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = re.sub(r"[^\s\"']*/site-packages/", "", text.replace(ROOT, "")).rstrip() + "\n"
        if request.config.getoption("--golden", default=False):
            path.write_text(text)
        expected = path.read_text() if path.exists() else ""
        diff = difflib.unified_diff(
            expected.splitlines(), text.splitlines(), str(path), "found", lineterm=""
        )
        assert text == expected, "\n".join(diff)

    return check


@pytest.fixture
def double() -> Iterator[None]:
    """Double precision, and the same random numbers in every test."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
