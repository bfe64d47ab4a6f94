"""Passes that are pure, run once for the same arguments: for tests of many plans of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn

from autopipe.passes import driver, phases


@contextmanager
def pure_passes_once() -> Iterator[None]:
    """Within this, a model is captured once and a stage is traced once, whatever the plan."""
    captures: dict[Any, Any] = {}
    traces: dict[Any, Any] = {}
    models: list[nn.Module] = []  # alive, so that no other one has its id
    capture, trace, forward_looks = driver.capture, phases.trace, phases.forward_looks

    def capture_once(model: nn.Module, leaves: Any, spec: Any, dims: Any, **options: Any) -> Any:
        models.append(model)
        chosen = tuple(sorted(options.items(), key=str))
        key = (id(model), model.training, str(spec), tuple(dims), chosen, *_looks(leaves))
        if key not in captures:
            captures[key] = capture(model, leaves, spec, dims, **options)
        return captures[key]

    def trace_once(stage: Any, inputs: Any, tangents: Any, device: Any, *, grad: bool) -> Any:
        key = (stage.fingerprint, tuple(inputs), tuple(tangents), device, grad)
        if key not in traces:
            traces[key] = trace(stage, inputs, tangents, device, grad=grad)
        return traces[key]

    def looks_once(stage: Any, inputs: Any, device: Any, *, grad: bool) -> Any:
        key = (stage.fingerprint, tuple(inputs), device, grad)
        if key not in traces:
            traces[key] = forward_looks(stage, inputs, device, grad=grad)
        return traces[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "capture", capture_once)
        patch.setattr(phases, "trace", trace_once)
        patch.setattr(phases, "forward_looks", looks_once)
        yield


def _looks(leaves: list[Any]) -> list[Any]:
    return [(x.shape[1:], x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves]
