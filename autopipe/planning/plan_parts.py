"""The parts of a plan, as plain data: entries for stages, and for the tensors between them."""

from __future__ import annotations

from dataclasses import dataclass, field

from autopipe.errors import printable
from autopipe.typed_json import json_name

BOUNDARY_KINDS = ("input", "activation", "parameter")
"""What `Boundary.kind` may be."""

EACH, ONCE = "each micro-batch", "once a step"
"""How often a tensor is sent."""


@dataclass(frozen=True)
class Boundary:
    """A tensor that stages receive from one another or from the caller, or return to the caller.

    Attributes:
        name: of the value in the captured graph, the same at both ends.
        kind: "input" of the call, "activation", or a shared "parameter" (sent once a step).
        tensor_type: dtype and shape as text: ``float32[B, 16]``, B being the batch size.
        source: the stage that computes or owns it; None: the caller.
        targets: the stages that receive it.
        returned: whether it is (a part of) a result of the model.
    """

    name: str
    kind: str
    tensor_type: str = field(metadata=json_name("looks"))
    source: int | None
    targets: tuple[int, ...]
    returned: bool

    def __str__(self) -> str:
        source = "caller" if self.source is None else f"stage {self.source}"
        targets = [f"stage {k}" for k in self.targets] + ["caller"] * self.returned
        return printable(f"{self.name}: {self.tensor_type} {source} -> {', '.join(targets)}")


@dataclass(frozen=True)
class Crossing(Boundary):
    """A boundary tensor with its size in a plan.

    Attributes:
        nbytes: bytes, in the largest micro-batch.
        gradient: how often parts of a shared parameter's gradient are sent to its owner: `EACH` or
            `ONCE`; None: never, or it is no parameter.
    """

    nbytes: int
    gradient: str | None = None

    @property
    def sent(self) -> str:
        """How often it is sent, and its gradient back, if it is a shared parameter."""
        if self.kind != "parameter":
            return EACH
        return ONCE if self.gradient is None else f"{ONCE}, its gradient {self.gradient}"


@dataclass(frozen=True)
class Segment:
    """A run of ops of one stage, in the captured order; it ends where the next run begins.

    Attributes:
        call: name of its first op.
        stage: the stage that its ops belong to.
    """

    call: str
    stage: int


@dataclass(frozen=True)
class DuplicatedCall:
    """An op that several stages compute, because that costs less than sending its result.

    Attributes:
        call: name of the op.
        stages: the stages that compute it, ascending.
    """

    call: str
    stages: tuple[int, ...]


@dataclass(frozen=True)
class Times:
    """Predicted seconds of one micro-batch in one stage.

    Attributes:
        forward, recompute, backward, weight: of the phases F, R, B and W; where B and W are one
            phase, `backward` is the time of both.
        receive: from the end of the previous stage's forward until its results have arrived.
        send_gradients: the same for their gradients, to the previous stage.
        issue: in which the host's process issues its operator calls; 0 where that is not known. The
            stages of all devices share the process.
        offload: of a copy of what the stage offloads, to the host or back; 0 if that is nothing.
    """

    forward: float
    recompute: float
    backward: float
    weight: float
    receive: float
    send_gradients: float = field(metadata=json_name("give_back"))
    issue: float = 0.0
    offload: float = 0.0

    @property
    def work(self) -> float:
        """Time of all phases, without transfers."""
        return self.forward + self.recompute + self.backward + self.weight


@dataclass(frozen=True)
class DeviceTotal:
    """The memory of a device that has one or more stages.

    Attributes:
        peak_saved_bytes: saved by all micro-batches at its stages, at most at once.
        memory_bytes: all memory that its stages need.
        limit_bytes: the user's limit; None: no limit was set.
    """

    peak_saved_bytes: int
    memory_bytes: int
    limit_bytes: int | None


@dataclass(frozen=True)
class StagePlan:
    """One stage in numbers. FLOPs and bytes are for the largest micro-batch, unless they say more.

    Attributes:
        first: name of its first op in the captured graph; None if it has no op.
        modules: the first and the last module that it computes, as `modules_by_stage` says, or its
            first op if none is in a module.
        calls: number of ops of the captured graph that it computes.
        device: the device that it was planned for, as text.
        speeds: where the times come from: a device of `autopipe.passes.devices`, or
            "measured on ...".
        remat: rematerialization policy, or a fraction as text.
        parameters: qualified names of the parameters that it owns.
        flops: of its forward.
        times: one for each size of micro-batch, the largest first.
        parameter_bytes: of the parameters that it owns.
        gradient_bytes: of their gradients.
        optimizer_bytes: of the optimizer state for them.
        buffer_bytes: of its buffers and constants.
        shared_copy_bytes: of its copies of parameters that other stages own.
        activation_bytes: new memory that its forward allocates.
        saved_bytes: saved by one micro-batch from forward to backward.
        offloaded_bytes: the part of these that is on the host meanwhile, of micro-batches that the
            schedule gives time to.
        in_flight: number of micro-batches whose tensors are saved at once, at most.
        peak_saved_bytes: saved by all of them, on the device.
        peak_bytes: peak of the memory that a step uses beyond `static_bytes`: saved tensors, queued
            messages, temporaries of a phase, and accumulated gradients (which are assumed to be
            freed before the next forward, as `zero_grad` does).
        limit_bytes: what its device has for it: the device's limit without what other stages on
            it use at the device's peak; None: no limit was set.
        kept_bytes: of the sums of gradients that CUDA graphs keep from step to step.
    """

    first: str | None
    modules: str
    calls: int
    device: str
    speeds: str
    remat: str
    parameters: tuple[str, ...]
    flops: int
    times: tuple[Times, ...]
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    buffer_bytes: int
    shared_copy_bytes: int = field(metadata=json_name("lent_bytes"))
    activation_bytes: int
    saved_bytes: int
    in_flight: int
    peak_saved_bytes: int
    peak_bytes: int
    limit_bytes: int | None
    offloaded_bytes: int = 0
    kept_bytes: int = 0

    @property
    def planned_device(self) -> str:
        """The device that times and memory are meant for, as text.

        It is the device model's name where the stage is planned for a device that is not here; a
        GPU's torch name and model; else the torch device.
        """
        if self.speeds.startswith("measured") or self.speeds == "cpu-core":
            return self.device
        return self.speeds if self.device == "cpu" else f"{self.device} ({self.speeds})"

    @property
    def forward_seconds(self) -> float:
        """Forward of the largest micro-batch."""
        return self.times[0].forward

    @property
    def backward_seconds(self) -> float:
        """Backward of the largest micro-batch: gradients of inputs and of parameters."""
        return self.times[0].backward + self.times[0].weight

    @property
    def recompute_seconds(self) -> float:
        """Recomputation before the backward, for the largest micro-batch."""
        return self.times[0].recompute

    @property
    def seconds(self) -> float:
        """Forward, recomputation and backward of the largest micro-batch."""
        return self.times[0].work

    @property
    def static_bytes(self) -> int:
        """Memory in use whether a step runs or not."""
        own = self.parameter_bytes + self.optimizer_bytes
        return own + self.buffer_bytes + self.shared_copy_bytes + self.kept_bytes

    @property
    def memory_bytes(self) -> int:
        """All memory that the stage needs on its device."""
        return self.static_bytes + self.peak_bytes
