"""Passes that are pure, run once for the same arguments: for tests of many plans of a model.

What differs between plans stays: the cut in space, chains of tensor metadata, code, a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn

from autopipe.passes import driver
from autopipe.passes.capture.request import CaptureRequest
from autopipe.passes.phases import cut as phases


@contextmanager
def pure_passes_once() -> Iterator[None]:
    """Within this, a model is captured and costed once, a stage traced and cut once."""
    captures: dict[Any, Any] = {}
    costs: dict[int, Any] = {}
    traces: dict[Any, Any] = {}
    cuts: dict[Any, Any] = {}
    alive: list[Any] = []  # so that nothing else has the id of what is here
    capture, annotate = driver.capture, driver.annotate
    trace_joint, cut_joint = phases.trace_joint, phases.cut_joint
    forward_metadata = phases.forward_metadata

    def capture_once(request: CaptureRequest) -> Any:
        model = request.model
        assert isinstance(model, nn.Module)
        alive.append(model)
        options = (request.whole, request.single, request.batch_norm, request.out_reduce)
        call = (str(request.spec), tuple(request.batch_dims), *_metadata_of(request.leaves))
        key = (id(model), model.training, options, *call)
        if key not in captures:
            captures[key] = capture(request)
        return captures[key]

    def annotate_once(captured: Any) -> Any:
        if id(captured) not in costs:
            alive.append(captured)
            costs[id(captured)] = annotate(captured)
        return costs[id(captured)]

    def trace_once(stage: Any, inputs: Any, tangents: Any, device: Any, *, grad: bool) -> Any:
        key = (stage.fingerprint, tuple(inputs), tuple(tangents), device, grad)
        if key not in traces:
            traces[key] = trace_joint(stage, inputs, tangents, device, grad=grad)
        return traces[key]

    def metadata_once(stage: Any, inputs: Any, device: Any, *, grad: bool) -> Any:
        key = (stage.fingerprint, tuple(inputs), device, grad)
        if key not in traces:
            traces[key] = forward_metadata(stage, inputs, device, grad=grad)
        return traces[key]

    def cut_once(stage: Any, joint: Any, remat: str, device: Any) -> Any:
        # Under the names of the first stage with this trace: `phases` gives each its own.
        key = (id(joint), len(stage.held), len(stage.lent), remat, device)
        if key not in cuts:
            alive.append(joint)
            cuts[key] = cut_joint(stage, joint, remat, device)
        return cuts[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "capture", capture_once)
        patch.setattr(driver, "annotate", annotate_once)
        patch.setattr(phases, "trace_joint", trace_once)
        patch.setattr(phases, "forward_metadata", metadata_once)
        patch.setattr(phases, "cut_joint", cut_once)
        yield


def _metadata_of(leaves: Sequence[Any]) -> list[Any]:
    return [(x.shape[1:], x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves]
