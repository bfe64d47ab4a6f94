"""Hooks that every module of the process calls (`register_module_forward_hook`).

A pipeline has modules of its own, and captured ones that are no longer called: such a hook acted on
the wrong ones, and one that was registered or removed after the capture was not noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

import autopipe
from autopipe.errors import CaptureError
from tests.support.programs import user_line

KINDS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "forward": (torch_module.register_module_forward_hook, lambda m, i, o: o * 2),  # line a
    "before": (torch_module.register_module_forward_pre_hook, lambda m, i: (i[0] * 2,)),
    "backward": (torch_module.register_module_full_backward_hook, lambda m, i, o: (i[0] * 2,)),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def batch() -> Tensor:
    return torch.linspace(-1, 1, 28).view(7, 4).requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_changes_a_value_is_refused_for_as_long_as_it_is_there(kind: str) -> None:
    register, hook = KINDS[kind]
    pipe = autopipe.compile(model(), 2, 3)
    expected = pipe(batch())
    handle = register(hook)
    try:
        for _ in range(2):
            with pytest.raises(CaptureError, match="hook"):
                pipe(batch())
    finally:
        handle.remove()
    torch.testing.assert_close(pipe(batch()), expected, rtol=0, atol=0)
    torch.testing.assert_close(pipe(batch()), pipe.model(batch()))


def test_the_error_names_its_line() -> None:
    register, hook = KINDS["forward"]
    handle = register(hook)
    try:
        with pytest.raises(CaptureError, match="all modules of the process") as caught:
            autopipe.compile(model(), 2, 3)(batch())
        assert list(torch_module._global_forward_hooks.values()) == [hook]
    finally:
        handle.remove()
    assert caught.value.source == user_line(hook, "# line" + " a")


def test_one_that_observes_is_named_in_a_warning() -> None:
    seen: list[nn.Module] = []
    handle = torch_module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        pipe = autopipe.compile(model(), 2, 3)
        with pytest.warns(UserWarning, match="a forward hook of every module"):
            found = pipe(batch())
        seen.clear()
        pipe(batch())
        assert seen == [pipe]
    finally:
        handle.remove()
    torch.testing.assert_close(found, pipe.model(batch()))


def test_torchs_own_cost_no_capture() -> None:
    pipe = autopipe.compile(model(), 2, 3)
    pipe(batch())
    captured = pipe.captured
    for _ in range(2):
        with FlopCounterMode(display=False):
            pipe(batch())
        assert pipe.captured is captured
