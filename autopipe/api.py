"""The two ways in: `compile` a model, or `plan` one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopipe.batch import batch_of
from autopipe.call_signature import flatten
from autopipe.module import Pipeline
from autopipe.options import parse_options
from autopipe.passes.capture import as_module
from autopipe.passes.driver import costed
from autopipe.passes.schedule import DEFAULT_KIND
from autopipe.planning.choice import choose
from autopipe.planning.plans import Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    import torch
    from torch import Tensor

    from autopipe.passes.capture import UserModel
    from autopipe.passes.devices import Device


def compile(
    model: UserModel,
    devices: int | Sequence[str | torch.device] | None = None,
    chunks: int | None = None,
    *,
    plan: Plan | str | PathLike[str] | None = None,
    schedule: str | None = None,
    remat: str | float | Sequence[str | float] | None = None,
    memory: int | str | Sequence[int | str] | None = None,
    profile: bool = False,
    in_dims: Any = 0,
    out_reduce: str | None = None,
    batch_norm: str = "deferred",
    loss_fn: Callable[..., Tensor] | None = None,
    backend: str = "eager",
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Pipeline:
    """Make a micro-batch pipeline of a model (GPipe, arXiv 1811.06965).

    Args:
        model: any module (a GraphModule too), or an ExportedProgram with a dynamic batch dimension.
            It is not changed, but that its parameters move to their stages' devices.
        devices: how many stages, or one device for each. A count means ``cuda:0 … cuda:n-1``;
            where there is no GPU, that many CPU workers.
        chunks: M, the number of micro-batches that a batch is cut into (fewer for a batch with
            fewer samples; it need not divide). None: the planner chooses on the first batch.
        plan: a `Plan`, or the file of one: its cut, and whatever of devices, chunks, schedule and
            remat is not given. It must be of this model, with inputs like those it was made with.
        schedule: "gpipe" (default): all micro-batches forward, then all backward; "auto": the best
            of those that the runtime runs.
        remat: what stages keep from forward to backward: "full" (default) only what they received,
            running their forward again (GPipe section 2.3); "none" all that autograd would;
            "min-cut" what functorch's partitioner chooses; a fraction from 0 to 1 of what that
            keeps; "auto": for each stage the one that makes least work and fits. Or a list of one
            for each stage.
        memory: what a device has for the pipeline, in bytes or as "16GiB" or "80GB", or a list of
            one for each device. The plan keeps to it: parameters, their gradients, Adam's state,
            what micro-batches keep and what is made meanwhile.
        profile: time the model's calls and stages on the devices, where choices need times,
            instead of taking them from a table.
        in_dims: the batch dimension of the inputs, as for `torch.vmap`: an integer for all, None
            for "not batched", a tuple by position or a dict by name.
        out_reduce: how micro-batches make the whole batch's where a result is one number and its
            rule cannot be derived from the graph: "mean" (weighted by samples) or "sum".
        batch_norm: each micro-batch is normalised by its own statistics (GPipe section 2.2).
            "deferred": running statistics, and other buffers written in the forward, change once
            a step, as if the whole batch had been seen at once; "micro": once per micro-batch.
        loss_fn: for `Pipeline.step`: ``loss_fn(output, target)``.
        backend: "eager".
        args, kwargs: example inputs: compile now. Without them, on the first call.

    Returns:
        A `Pipeline`: a module with the model's own parameters and the same results.

    Raises:
        OptionError, DeviceError, UnsupportedError: an argument is wrong or not implemented.
        CaptureError: the model cannot be captured faithfully.
        CouplingError: the model mixes the samples of a batch.
        InputError: the example inputs have no common batch size.
        PartitionError: the model has too few calls for so many stages.
        MemoryLimitError: no plan keeps the memory limit; it says what would.
        PlanError: the file is no plan, or the plan names calls that this model does not make.
    """
    if plan is not None and not isinstance(plan, Plan):
        plan = Plan.load(plan)
    options = parse_options(
        devices=devices,
        chunks=chunks,
        schedule=schedule,
        remat=remat,
        memory=memory,
        profile=profile,
        in_dims=in_dims,
        out_reduce=out_reduce,
        batch_norm=batch_norm,
        loss_fn=loss_fn,
        backend=backend,
        plan=plan,
    )
    pipeline = Pipeline(as_module(model), options)
    if args or kwargs:
        pipeline.capture(*args, **(kwargs or {}))
    return pipeline


def plan(
    model: UserModel,
    devices: int | Sequence[str | torch.device],
    chunks: int | None = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    schedule: str = DEFAULT_KIND,
    remat: str | float | Sequence[str | float] = "full",
    memory: int | str | Sequence[int | str] | None = None,
    device: str | Device | Sequence[str | Device] | None = None,
    profile: bool = False,
    in_dims: Any = 0,
    out_reduce: str | None = None,
    batch_norm: str = "deferred",
) -> Plan:
    """How `compile` would cut a model, what each stage takes, and how long a step is.

    Weights are not needed, nor GPUs: a model built under ``torch.device("meta")`` does.

    Args:
        model, schedule, remat, memory, profile, in_dims, out_reduce, batch_norm: as for `compile`.
        devices: how many stages, or one device for each; a count may be more than are here.
        chunks: M; None: the one with which the predicted step is shortest.
        args, kwargs: example inputs; their batch is the one that is planned for.
        device: whose speeds and links: a name in `passes.devices.DEVICES` ("h100", "cpu-core"), a
            `passes.devices.Device`, or a list of one for each stage. None: those of `devices`.

    Returns:
        The `Plan`: stages, boundary tensors, times, memory, predicted timeline.

    Raises:
        As `compile` does.
    """
    options = parse_options(
        devices=devices,
        chunks=chunks,
        schedule=schedule,
        remat=remat,
        memory=memory,
        device=device,
        profile=profile,
        in_dims=in_dims,
        out_reduce=out_reduce,
        batch_norm=batch_norm,
        elsewhere=not profile,
    )
    module = as_module(model)
    kwargs = kwargs or {}
    leaves, spec = flatten(args, kwargs)
    dims, batch = batch_of(in_dims, module, args, kwargs)
    annotated = costed(options.capture_request(module, leaves, spec, dims))
    return choose(module, annotated, leaves, batch, options).plan
