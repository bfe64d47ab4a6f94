"""From a model and a call to the program that each pass makes of it, step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from autopipe.batch_dims import batch_of
from autopipe.call_signature import flatten
from autopipe.passes.capture.model import capture
from autopipe.passes.capture.request import CaptureRequest
from autopipe.passes.cost.node_costs import annotate
from autopipe.passes.devices import DEFAULT
from autopipe.passes.ir.captured import Annotated, Captured
from autopipe.passes.ir.phased import Phased
from autopipe.passes.ir.split import Split, StageGraph
from autopipe.passes.ir.values import Input, InputKind
from autopipe.passes.phases.cut import cut_phases
from autopipe.passes.phases.metadata import TensorMeta
from autopipe.passes.phases.request import PhaseRequest, TraceCache
from autopipe.passes.remat_policies import RematPolicy, parse_policy
from autopipe.passes.split.cut import split
from autopipe.passes.split.objective import Objective, objective_of
from tests.support.models import MODELS

CPU = torch.device("cpu")
Call = tuple[tuple[Any, ...], dict[str, Any]]


def captured_of(
    model: nn.Module,
    *args: Any,
    in_dims: Any = 0,
    whole: bool = False,
    batch_norm: str = "micro",
    **kwargs: Any,
) -> Captured:
    """Capture `model(*args, **kwargs)`; writes to buffers stay, so that later passes see them."""
    leaves, spec = flatten(args, kwargs)
    dims, _ = batch_of(in_dims, model, args, kwargs)
    request = CaptureRequest(model, leaves, spec, dims, whole=whole, batch_norm=batch_norm)
    return capture(request)


def policy(option: str | float) -> RematPolicy:
    """The rematerialization policy that an option denotes."""
    found = parse_policy(option)
    assert found is not None
    return found


def objective_for(stages: int, batch: int) -> Objective:
    """Equal devices of the kind that tests run on, and everything recomputed."""
    return objective_of([DEFAULT] * stages, batch)


def split_of(model: nn.Module, stages: int, *args: Any, batch: int = 2, **kwargs: Any) -> Split:
    """Capture, cost and cut."""
    return split(annotate(captured_of(model, *args, **kwargs)), objective_for(stages, batch))


def phased_of(
    cut: Split,
    model: nn.Module,
    size: int,
    call: Call,
    *,
    remat: str | float = "full",
    grad: bool = True,
    differentiated: Sequence[str] | None = None,
    traced: TraceCache | None = None,
) -> Phased:
    """Cut a split program in time, for the CPU, from the first `size` samples of a call."""
    metadata = {
        i.name: TensorMeta.of(t)._replace(requires_grad=t.requires_grad)
        for i, t in zip(cut.captured.inputs, tensors(cut.captured, model, call, size), strict=True)
    }
    wanted = (o.name for o in cut.captured.outputs) if differentiated is None else differentiated
    request = PhaseRequest(
        cut,
        {size: metadata},
        (CPU,) * len(cut.stages),
        (policy(remat),) * len(cut.stages),
        grad,
        frozenset(wanted),
    )
    return cut_phases(request, size, traced or TraceCache())


def tensors(captured: Captured, model: nn.Module, call: Call, size: int | None = None) -> list[Any]:
    """What to call the captured graph with: the model's own tensors and those of a call."""
    leaves, _ = flatten(*call)
    return [_tensor(captured, model, leaves, item, size) for item in captured.inputs]


def _tensor(
    captured: Captured, model: nn.Module, leaves: Sequence[Any], item: Input, size: int | None
) -> Tensor:
    if item.kind is not InputKind.INPUT:
        return captured.tensor_of(model, item)
    leaf: Tensor = leaves[item.index]
    if size is None or item.batch_dim is None:
        return leaf
    return leaf.narrow(item.batch_dim, 0, size)


def run_stages(cut: Split, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the stage graphs by hand, one after another, passing on names only.

    Args:
        cut: the stages.
        values: name → tensor, for the placeholders of the captured graph.

    Returns:
        `values` and everything that a stage returned.
    """
    known = dict(values)
    for stage in cut.stages:
        results = stage.graph_module(*(known[n] for n in stage.signature))
        known |= dict(zip(stage.returns, results, strict=True))
    return known


def copied(module: fx.GraphModule, name: str = "Copy") -> fx.GraphModule:
    """A copy to break on purpose (nodes keep their names and looks)."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule({}, graph, name)


def node(graph: fx.Graph, name: str) -> fx.Node:
    found: fx.Node = next(n for n in graph.nodes if n.name == name)
    return found


def calls(graph: fx.Graph, target: Callable[..., Any] | None = None) -> list[fx.Node]:
    """The computing nodes of a graph, or those of one operator."""
    found = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    return found if target is None else [n for n in found if n.target is target]


def sole_stage(model: nn.Module, *args: Any, **kwargs: Any) -> StageGraph:
    """A model as one stage."""
    (stage,) = split_of(model, 1, *args, **kwargs).stages
    return stage


@functools.cache
def known(name: str) -> tuple[nn.Module, Any, Annotated]:
    """A model of `tests.support.models`: itself, its inputs by batch size, and its costed
    capture."""
    model, inputs = MODELS[name].make()
    args, kwargs = inputs(4)
    return model, inputs, annotate(captured_of(model, *args, **kwargs))


def user_line(function: Callable[..., Any], text: str) -> str:
    """``file:line`` of the line of `function`'s source file in which `text` stands, once."""
    path = Path(function.__code__.co_filename)
    (number,) = [n for n, line in enumerate(path.read_text().splitlines(), 1) if text in line]
    return f"{path}:{number}"
