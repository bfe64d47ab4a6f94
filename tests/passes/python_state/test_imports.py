"""A forward that imports a Python module for the first time: what an import sets is no state.

Covers python_state/kinds.py.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError
from tests.support.agreement import pipelined

LIBRARY = {
    "lazy_library/__init__.py": "SIZE = 3",
    "lazy_library/scales.py": """
        from random import random

        DRAWN = random()
        REGISTRY = {}

        def register(function):
            REGISTRY[function.__name__] = function
            return function

        @register
        def scale(x):
            return x * REGISTRY["factor"]()

        @register
        def factor():
            return 3.0

        class Shift:
            amount = [2.0]

            def __call__(self, x):
                return x + self.amount[0]

        print("imported")
    """,
    "lazy_library/caller.py": """
        import lazy_library

        def call(x):
            import lazy_library.scales

            return lazy_library.scales.scale(x)
    """,
}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, text in LIBRARY.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.startswith("lazy_library")]:
        monkeypatch.delitem(sys.modules, name)


def imports_a_module(x: Tensor) -> Tensor:
    import lazy_library.scales as scales  # type: ignore[import-not-found]

    return scales.scale(x)


def imports_names(x: Tensor) -> Tensor:
    from lazy_library.scales import Shift, scale

    return Shift()(scale(x))


def imports_a_part(x: Tensor) -> Tensor:
    import lazy_library
    import lazy_library.scales

    return lazy_library.scales.scale(x) * lazy_library.SIZE


def imports_by_name(x: Tensor) -> Tensor:
    return importlib.import_module("lazy_library.scales").scale(x)


def imports_while_it_is_called(x: Tensor) -> Tensor:
    return importlib.import_module("lazy_library.caller").call(x)


class Imports(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.first(x)))
        return y


FUNCTIONS: tuple[Any, ...] = (
    imports_a_module,
    imports_names,
    imports_a_part,
    imports_by_name,
    imports_while_it_is_called,
)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("parent", [False, True])
def test_a_module_is_imported_in_the_forward(
    function: Callable[[Tensor], Tensor], parent: bool
) -> None:
    if parent:
        importlib.import_module("lazy_library.caller")
    torch.manual_seed(0)
    model = Imports(function)
    pipe = pipelined(model)
    for samples in (4, 6):
        x = torch.randn(samples, 4)
        torch.testing.assert_close(pipe(x), model(x))
    assert autopipe.explain_captures(pipe).count == 1
    scales: ModuleType = sys.modules["lazy_library.scales"]
    assert sorted(scales.REGISTRY) == ["factor", "scale"]
    assert sys.modules["lazy_library"].scales is scales


@pytest.mark.usefixtures("library")
def test_a_module_is_whole_after_a_refused_forward() -> None:
    def refused(x: Tensor) -> Tensor:
        y = imports_a_part(x)
        return y * 2 if y.sum() > 0 else y

    with pytest.raises(CaptureError):
        pipelined(Imports(refused))(torch.randn(4, 4))
    x = torch.ones(2)
    assert imports_a_part(x).tolist() == [9, 9]


def test_torch_is_whole_after_a_refused_forward() -> None:
    """`torch.cond` imports functorch.compile, which inductor needs later."""

    def conditional(x: Tensor) -> Tensor:
        y: Tensor = torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t * 3, (x,))
        return y

    with pytest.raises(CaptureError):
        pipelined(Imports(conditional))(torch.randn(4, 4))
    assert hasattr(importlib.import_module("functorch.compile"), "draw_graph")
