"""Checks of values are passed over, and said to be; every other branch is refused."""

from __future__ import annotations

import inspect
import linecache
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopipe.errors import CaptureError
from tests.support import checking
from tests.support.agreement import assert_agrees, pipelined

pytestmark = [
    pytest.mark.few(4),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="frames do not tell their columns"),
]
X = torch.randn(7, 4, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 2, 1, 0, 1])
REMARK = r"forward checks values of tensors \(.*; the pipeline does not make this check"


class Model(nn.Module):
    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.f = f

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return self.f(self.last(torch.tanh(self.first(x))), labels)


@pytest.mark.parametrize("check", checking.CHECKS)
def test_a_check_is_passed_over_and_named(check: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match=REMARK) as caught:
        assert_agrees(pipelined(Model(check)), X, LABELS)
    lines, first = inspect.getsourcelines(
        vars(checking)["_check"] if check is checking.in_a_function else check
    )
    text = str(next(w.message for w in caught if "checks values" in str(w.message)))
    number = int(text.partition("checking.py:")[2].partition(")")[0])
    assert first < number < first + len(lines)


@pytest.mark.parametrize("check", [checking.raises, checking.asserts])
def test_a_check_that_would_fail_is_not_made(check: Callable[..., Any]) -> None:
    """The note says so; what follows computes as if the check were not there."""
    x = X.clone()
    x[0, 0] = torch.nan
    with pytest.warns(UserWarning, match=REMARK):
        pipe = pipelined(Model(check), args=(X, LABELS))
    assert pipe(x, LABELS).isnan()


@pytest.mark.parametrize("branch", checking.BRANCHES)
def test_a_branch_that_does_more_than_to_raise_is_refused(branch: Callable[..., Any]) -> None:
    with pytest.raises(CaptureError, match=r"(depends on|checks) the values of tensors") as caught:
        pipelined(Model(branch))(X, LABELS)
    assert caught.value.remedy is not None
    assert "only raises or asserts" in caught.value.remedy


def test_an_error_that_the_forward_catches_is_raised_after_it() -> None:
    """What a handler computes in the place of a branch that cannot be captured is not the model's.

    (A ``finally`` that returns, in `checking.leaves_finally`, ends the error as well.)
    """

    def catching(x: Tensor, labels: Tensor) -> Tensor:
        try:
            if labels.max() > 1:
                x = x * 2
        except Exception:
            x = x * 3
        return checking.loss(x, labels)

    with pytest.raises(CaptureError, match="control flow") as caught:
        pipelined(Model(catching))(X, LABELS)
    assert "test_value_checks.py" in str(caught.value.source)


def test_a_check_whose_source_is_another_is_refused(tmp_path: Any) -> None:
    """The lines of a file that was changed since its code was loaded tell nothing."""
    path = tmp_path / "changing.py"
    text = "def f(x, labels):\n    if labels.max() >= 3:\n        {}\n    return x\n"
    for loaded, shown in (("x = x * 2", "raise KeyError"), ("raise KeyError", "raise KeyError")):
        found: dict[str, Any] = {}
        exec(compile(text.format(loaded), str(path), "exec"), found)
        path.write_text(text.format(shown))
        linecache.checkcache(str(path))
        pipe = pipelined(Model(found["f"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if loaded == shown:
                assert_agrees(pipe, X, LABELS)
            else:
                with pytest.raises(CaptureError, match="control flow"):
                    pipe(X, LABELS)
