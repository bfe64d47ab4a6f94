"""The two entry points: `compile` a model, or `plan` one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from autopipe.batch_dims import batch_of
from autopipe.call_signature import examples, flatten
from autopipe.cut_positions import cut_positions
from autopipe.errors import OptionError
from autopipe.module import Pipeline
from autopipe.options import parse_options
from autopipe.passes.capture import as_module
from autopipe.passes.driver import capture_with_costs
from autopipe.planning.choice import choose
from autopipe.planning.plans import Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from os import PathLike

    import torch
    from torch import Tensor

    from autopipe.capture_log import CaptureReport
    from autopipe.option_names import (
        Backend,
        BatchNorm,
        CutAtOption,
        Mode,
        OutReduce,
        OwnSchedule,
        Remat,
        Schedule,
        StageRemat,
    )
    from autopipe.passes.capture import UserModel
    from autopipe.passes.devices import Device
    from autopipe.planning.measured import Measured


def compile(
    model: UserModel,
    devices: int | Sequence[int | str | torch.device] | None = None,
    chunks: int | None = None,
    *,
    plan: Plan | str | PathLike[str] | None = None,
    schedule: Schedule | OwnSchedule | None = None,
    virtual_stages: int | None = None,
    remat: Remat | float | Sequence[StageRemat | float] | None = None,
    memory: float | str | Sequence[float | str] | None = None,
    profile: bool | Measured = False,
    in_dims: Any = 0,
    out_reduce: OutReduce | None = None,
    batch_norm: BatchNorm = "deferred",
    loss_fn: Callable[..., Tensor] | None = None,
    backend: Backend = "eager",
    dynamic: Mapping[str, Mapping[int, str | None]] | None = None,
    cache_size: int = 32,
    cut_at: CutAtOption = None,
    mode: Mode | None = None,
    exact: bool = True,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Pipeline:
    """Compile a model into a micro-batch pipeline (GPipe, arXiv 1811.06965).

    Args:
        model: any module (also a GraphModule), or an ExportedProgram with a dynamic batch
            dimension. It is not changed, except that its parameters move to the devices of their
            stages.
        devices: number of devices, or a list. A number means ``cuda:0 … cuda:n-1``, or
            that many CPU workers where there is no GPU. In a list a number is a GPU's index:
            ``[0, 1]`` means ``["cuda:0", "cuda:1"]``.
        chunks: M, the number of micro-batches that a batch is split into (fewer for a batch with
            fewer samples, or where batch norm in training would see one value per channel; it need
            not divide). None: the planner chooses on the first batch.
        plan: a `Plan` or the file of one. Its cut is used, and its devices, chunks, schedule and
            remat if these are not given. It must be a plan of the same model with similar inputs.
        schedule: "gpipe" (default): all micro-batches forward, then all backward. With the other
            kinds, backwards start before all forwards have ended, in training: a call runs both,
            and its backward only multiplies. They need the loss in the model, or `loss_fn` and
            `Pipeline.step`. docs/tables.md lists the kinds, with their papers. "auto": all kinds
            are planned, and the fastest that fits is taken. Or your own: a function from K
            (devices) and M (micro-batches) to a list of actions for each device (``"F0.1"``,
            ``"BW0.1"``; see `passes.schedule.scheduled_from_lists`), or a `Scheduled`, as
            `read_schedule` returns.
        virtual_stages: v, the number of stages per device, for a schedule that leaves the choice
            ("interleaved"). None: the schedule's own number. The model is cut into v stages for
            each device.
        remat: which activations stages save between forward and backward. "full" (default): only
            what they received, and their forward is recomputed (GPipe section 2.3); "none": all
            that autograd saves; "min-cut": what functorch's partitioner chooses; a number from 0
            to 1: that fraction of min-cut's bytes; "auto": for each stage the policy that
            recomputes least and fits. Or a list of one for each device, or for each stage.
        memory: limit per device, in bytes (``16e9``) or as "16GiB" or "80GB", or a list of one for
            each device. It covers parameters, gradients, Adam's state, saved activations of all
            micro-batches in flight, and temporary tensors.
        profile: where times come from, if choices need them. False: from the device table. True:
            the model's ops and stages are measured on the devices. What `Pipeline.profile` gave:
            from measured steps of this model: the times of ops are scaled so that each measured
            stage takes as long as it did, forward and backward separately, in proportion to the
            estimates within a stage. The cut is chosen anew.
        in_dims: the batch dimension of the inputs, as for `torch.vmap`: an integer for all, None
            for "not batched", a tuple by position or a dict by name.
        out_reduce: how scalar results of micro-batches are combined if the rule cannot be derived
            from the graph: "mean" (weighted by samples) or "sum".
        batch_norm: each micro-batch is normalised by its own statistics (GPipe section 2.2).
            "deferred": running statistics, and other buffers written in the forward, change once
            per step, as if the whole batch had been seen at once; "micro": once per micro-batch.
        loss_fn: for `Pipeline.step`: ``loss_fn(output, target)``. It is captured with the model
            where the schedule needs the loss.
        backend: what runs the phases of each stage. "eager" (default): ATen operators, with the
            bits of eager PyTorch. "inductor": torch's compiler; each phase of each different stage
            is compiled once, when the program is made. Numbers are equal up to rounding. Random
            draws and sums of gradients stay as they are. A phase that inductor cannot compile runs
            eagerly, after a warning. "cudagraphs": ATen operators with the same bits, captured in
            the second step as CUDA graphs, so that each phase is one launch. What cannot be
            captured runs eagerly; `Pipeline.explain` says why.
        dynamic: sizes besides the batch that change from call to call, by argument and dimension,
            with a name or None: ``{"input_ids": {1: "length"}}``. They are symbolic from the first
            capture on. Without it, a size that changes costs one more capture, and is symbolic
            from then on. `torch._dynamo.mark_dynamic(tensor, dim)` marks one, too.
        cache_size: number of generated programs that are kept. Beyond it, those that were not used
            for longest are forgotten, and built anew when they are needed again.
        cut_at: where the model may be cut. None: anywhere. "blocks": not within the members of its
            lists of layers (``nn.ModuleList``, ``nn.Sequential``); a list whose members all differ,
            as the stages of a ResNet do, gives way to the lists in them. Classes of modules, or
            their names (``"LlamaDecoderLayer"``): not within such a module. Names of modules
            (``"transformer.h.3"``): only in front of these, so K - 1 names are the cut; of more the
            best are chosen. Each call of a module counts by itself. Only ops that get no gradient
            and cost less than sending their results, as those of masks, may be repeated elsewhere.
        exact: whether the gradient of a parameter that several stages share (tied embeddings) has
            the bits of eager PyTorch: with every micro-batch it goes from the last of these stages
            to the first, and each adds its part. False: each stage sums its part over the
            micro-batches, and the parts are added once, at the end of the step. Less is sent, and
            this gradient rounds differently; all others keep their bits.
        mode: of inductor, as for `torch.compile`: "default", "reduce-overhead", "max-autotune" or
            "max-autotune-no-cudagraphs". CUDA graphs are off in all of them.
        args, kwargs: example inputs, to compile immediately. Without them, the first call compiles.

    Returns:
        A `Pipeline`: a module with the model's own parameters and the same results.

    Raises:
        OptionError, DeviceError, UnsupportedError: an argument is wrong or not supported.
        CaptureError: the model cannot be captured faithfully.
        CouplingError: the model mixes the samples of a batch.
        InputError: the example inputs have no common batch size.
        PartitionError: the model has too few ops, or positions of `cut_at`, for the number of
            stages.
        MemoryLimitError: no plan fits the memory limit; the error names changes that would fit.
        PlanError: the file is not a plan, or the plan is for another model.
    """
    if plan is not None and not isinstance(plan, Plan):
        plan = Plan.load(plan)
    options = parse_options(
        devices=devices,
        chunks=chunks,
        schedule=schedule,
        virtual_stages=virtual_stages,
        remat=remat,
        memory=memory,
        profile=profile,
        in_dims=in_dims,
        out_reduce=out_reduce,
        batch_norm=batch_norm,
        loss_fn=loss_fn,
        backend=backend,
        plan=plan,
        dynamic=dynamic,
        cache_size=cache_size,
        cut_at=cut_at,
        mode=mode,
        exact=exact,
    )
    args, kwargs = examples(args, kwargs)
    module = _module_of(model)
    cut_positions(module, cut_at)  # which checks it
    pipeline = Pipeline(module, options)
    if args or kwargs:
        pipeline.capture(*args, **kwargs)
    return pipeline


def plan(
    model: UserModel,
    devices: int | Sequence[int | str | torch.device],
    chunks: int | None = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    schedule: Schedule | OwnSchedule = "gpipe",
    virtual_stages: int | None = None,
    remat: Remat | float | Sequence[StageRemat | float] = "full",
    memory: float | str | Sequence[float | str] | None = None,
    device: str | Device | Sequence[str | Device] | None = None,
    profile: bool | Measured = False,
    in_dims: Any = 0,
    out_reduce: OutReduce | None = None,
    batch_norm: BatchNorm = "deferred",
    cut_at: CutAtOption = None,
    exact: bool = True,
) -> Plan:
    """Predict how `compile` cuts a model, the memory and time of each stage, and of a step.

    This needs neither weights nor GPUs: the model may be built under ``torch.device("meta")``.

    Args:
        model, schedule, remat, memory, profile, in_dims, out_reduce, batch_norm, cut_at, exact: as
            for `compile`.
        devices: how many there are, or a list of them; a number may exceed what is present.
        chunks: M; None: the number with the shortest predicted step.
        args, kwargs: example inputs, with the batch size to plan for.
        device: device model for speeds and links: a name in `passes.devices.DEVICES` ("h100",
            "cpu-core"), a `passes.devices.Device`, or a list of one for each of `devices`. None:
            those of `devices`.

    Returns:
        The `Plan`: stages, boundary tensors, times, memory, predicted timeline.

    Raises:
        AutopipeError: as `compile` does.
    """
    options = parse_options(
        devices=devices,
        chunks=chunks,
        schedule=schedule,
        virtual_stages=virtual_stages,
        remat=remat,
        memory=memory,
        device=device,
        profile=profile,
        in_dims=in_dims,
        out_reduce=out_reduce,
        batch_norm=batch_norm,
        cut_at=cut_at,
        exact=exact,
        elsewhere=profile is not True,
    )
    module = _module_of(model)
    cut_positions(module, cut_at)  # which checks it
    args, kwargs = examples(args, kwargs)
    leaves, spec = flatten(args, kwargs)
    dims, batch = batch_of(in_dims, module, args, kwargs)
    # One cost per op: of mixed devices, those of the first GPU.
    kernels = next(filter(None, options.stage_kernels), None)
    request = options.capture_request(module, leaves, spec, dims)
    annotated = capture_with_costs(request, kernels=kernels)
    return choose(module, annotated, leaves, batch, options).plan


def explain_captures(pipe: Pipeline) -> CaptureReport:
    """Say how often, why, and for how long a pipeline's model was captured.

    Args:
        pipe: what `compile` returned.

    Returns:
        A `CaptureReport`: `print` it for a table; ``entries`` has for each capture its ``number``,
        ``why`` (what changed, from what to what), the seconds of ``capture``, ``cut`` and
        ``trace``, ``lengths`` (sizes that may have any value) and ``programs`` (how many were
        generated).

    Raises:
        OptionError: it is no pipeline.
    """
    if not isinstance(pipe, Pipeline):
        expected = "what autopipe.compile returned"
        raise OptionError("this is no pipeline", expected=expected, found=type(pipe).__name__)
    return pipe._programs.log.report()


def _module_of(model: UserModel) -> nn.Module:
    """The module of what the user passed, which must not hold a pipeline."""
    module = as_module(model)
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise OptionError(
            "the model is replicated over processes; a pipeline cannot capture what replicates it",
            found="torch.nn.parallel.DistributedDataParallel",
            remedy="compile the model in it, and replicate the pipeline:"
            " DistributedDataParallel(pipe)",
        )
    for name, part in module.named_modules():
        if isinstance(part, Pipeline):
            raise OptionError(
                "the model is a pipeline already"
                if part is module
                else "a part of the model is a pipeline already",
                expected="the model itself",
                found=f"{name}: {part!r}" if name else repr(part),
                remedy="compile pipe.model, with the options that you want; a pipeline can also be"
                " called beside other layers in an ordinary module",
            )
    return module
