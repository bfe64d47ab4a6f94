"""Passes that are pure, run once for the same arguments: for tests of many plans of a model.

What differs between plans stays: the cut in space, chains of tensor metadata, code, a run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopipe.model_state_key import model_state_key
from autopipe.passes import driver
from autopipe.passes.capture.request import CaptureRequest
from autopipe.passes.cost import node_costs
from autopipe.passes.cost.grad_flow import GradientAnalysis
from autopipe.passes.phases import cut as phases

TRACES: dict[Hashable, tuple[Any, Any]] = {}
"""What was traced so far in this process, by all that determines it; and the arguments, because a
fingerprint may hold addresses of functions that a stage calls."""
MOST = 400
"""Traces that are kept."""

CALLS: dict[Hashable, dict[Hashable, Any]] = defaultdict(dict)
"""By `_modes`, the calls that were costed so far in this process: `GradientAnalysis` keeps those of
one model."""
MOST_CALLS = 4000


@contextmanager
def traces_once() -> Iterator[None]:
    """Within this, a stage is traced and cut once, for all models in which it is the same program,
    and calls that are alike are costed once.

    A stage is known by its fingerprint, as in a pipeline's own cache. Not for tests of tracing or
    of costs, and not for tests of source lines: they are those of the model that came first.
    """
    trace_joint, cut_joint = phases.trace_joint, phases.cut_joint
    forward_metadata = phases.forward_metadata
    cuts: dict[Any, Any] = {}
    alive: list[Any] = []  # so that nothing else has the id of what is in `cuts`

    def once(key: Hashable, function: Any, *args: Any, **kwargs: Any) -> Any:
        key = (key, _modes())
        if key not in TRACES:
            if len(TRACES) >= MOST:
                TRACES.clear()
            TRACES[key] = function(*args, **kwargs), args
        return TRACES[key][0]

    def trace_once(stage: Any, inputs: Any, tangents: Any, device: Any, **more: Any) -> Any:
        key = (stage.fingerprint, tuple(inputs), tuple(tangents), device, _values_of(more))
        return once(key, trace_joint, stage, inputs, tangents, device, **more)

    def metadata_once(stage: Any, inputs: Any, device: Any, **more: Any) -> Any:
        key = (stage.fingerprint, tuple(inputs), device, _values_of(more))
        return once(key, forward_metadata, stage, inputs, device, **more)

    def cut_once(stage: Any, joint: Any, remat: Any, device: Any, *, exact: bool) -> Any:
        # Under the names of the first stage with this trace: `phases` gives each its own.
        key = (id(joint), len(stage.held), len(stage.shared), remat, device, exact)
        if key not in cuts:
            alive.append(joint)
            cuts[key] = cut_joint(stage, joint, remat, device, exact=exact)
        return cuts[key]

    class Analysis(GradientAnalysis):
        def __init__(self, captured: Any, kernels: Any = None) -> None:
            super().__init__(captured, kernels)
            self._distinct = CALLS[_modes(), kernels]
            if len(self._distinct) >= MOST_CALLS:
                self._distinct.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_costs, "GradientAnalysis", Analysis)
        patch.setattr(phases, "trace_joint", trace_once)
        patch.setattr(phases, "forward_metadata", metadata_once)
        patch.setattr(phases, "cut_joint", cut_once)
        yield


@contextmanager
def pure_passes_once(*, alike: bool = False) -> Iterator[None]:
    """As `traces_once`, and a model is captured and costed once: it must not change meanwhile.

    With `alike` also for all models that are made in the same way: for tests that each make one of
    the same class. Their parameters and buffers may differ in value, if the forward does not go by
    those.
    """
    captures: dict[Any, Any] = {}
    costs: dict[Any, Any] = {}
    alive: list[Any] = []  # so that nothing else has the id of what is here
    capture, annotate = driver.capture, driver.annotate

    def capture_once(request: CaptureRequest) -> Any:
        model = request.model
        assert isinstance(model, nn.Module)
        alive.append(model)
        options = (request.whole, request.single, request.batch_norm, request.out_reduce)
        options += (str(request.lengths),)
        call = (str(request.spec), tuple(request.batch_dims), *_metadata_of(request.leaves))
        which = _made_alike(model) if alike else id(model)
        key = (which, model.training, options, _modes(), *call)
        if key not in captures:
            captures[key] = capture(request)
        return captures[key]

    def annotate_once(captured: Any, kernels: Any = None) -> Any:
        key = id(captured), kernels
        if key not in costs:
            alive.append(captured)
            costs[key] = annotate(captured, kernels)
        return costs[key]

    with pytest.MonkeyPatch.context() as patch, traces_once():
        patch.setattr(driver, "capture", capture_once)
        patch.setattr(driver, "annotate", annotate_once)
        yield


def _values_of(more: dict[str, Any]) -> Hashable:
    """Whether gradients are recorded, an example of symbolic sizes, and whose kernels."""
    return more["grad"], tuple(more["example"].items()), more["kernels"]


def _modes() -> Hashable:
    """What a trace depends on beside its arguments."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    exact = torch.are_deterministic_algorithms_enabled()
    return autocast, torch.get_default_dtype(), exact, torch.is_inference_mode_enabled()


def _made_alike(model: nn.Module) -> Hashable:
    """Equal for two models of which a capture is the same: by what a pipeline watches, by the
    identity of their functions, and by which parameters want gradients."""
    functions = [
        (name, id(value))
        for module in model.modules()
        for name, value in vars(module).items()
        if callable(value)
    ]
    wanted = [p.requires_grad for p in model.parameters()]
    return model_state_key(model), tuple(functions), tuple(wanted)


def _metadata_of(leaves: Sequence[Any]) -> list[Any]:
    return [(x.shape[1:], x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves]
