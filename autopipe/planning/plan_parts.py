"""What a plan says of each stage and of each tensor between stages: plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Crossing:
    """A tensor that stages receive.

    Attributes:
        name: of the value in the captured graph.
        kind: "input" of the call, "activation", or a shared "parameter" (sent once a step).
        looks: dtype and shape, in words: ``float32[B, 16]``.
        source: the stage that makes or holds it; None: the caller.
        targets: the stages that receive it.
        returned: it is (a part of) a result of the model.
        nbytes: its size, in the largest micro-batch.
    """

    name: str
    kind: str
    looks: str
    source: int | None
    targets: tuple[int, ...]
    returned: bool
    nbytes: int

    def __str__(self) -> str:
        source = "caller" if self.source is None else f"stage {self.source}"
        targets = [f"stage {k}" for k in self.targets] + ["caller"] * self.returned
        return f"{self.name}: {self.looks} {source} -> {', '.join(targets)}"


@dataclass(frozen=True)
class Begin:
    """Where a stage that is no run of the captured order goes on in it.

    Attributes:
        call: from this call on, in the captured order,
        stage: calls are this stage's, until the next `Begin`.
    """

    call: str
    stage: int


@dataclass(frozen=True)
class Repeated:
    """A call that costs less to make in each stage that needs it than to send.

    Attributes:
        call: its name.
        stages: those that make it, ascending.
    """

    call: str
    stages: tuple[int, ...]


@dataclass(frozen=True)
class Times:
    """Predicted seconds of one micro-batch at one stage.

    Attributes:
        forward, recompute, backward, weight: of the phases F, R, B and W; where B and W are not
            told apart, all of both is `backward`.
        receive: until what the stage before has made is there.
        give_back: until the gradients of that are with the stage before.
    """

    forward: float
    recompute: float
    backward: float
    weight: float
    receive: float
    give_back: float

    @property
    def work(self) -> float:
        """All that the device computes."""
        return self.forward + self.recompute + self.backward + self.weight


@dataclass(frozen=True)
class StagePlan:
    """What one stage does; sizes are those of the largest micro-batch, or of the step.

    Attributes:
        first: name of its first call in the captured graph; None if it has no call.
        calls: how many calls of the captured graph it makes.
        device: where it was planned to run, in words.
        speeds: whose times these are: a device of `autopipe.passes.devices`, or "measured on ...".
        remat: what it keeps from forward to backward: a policy, or a fraction as text.
        parameters: qualified names of the parameters that live here.
        flops: of its forward.
        times: for each size of micro-batch, the largest first.
        parameter_bytes: of the parameters that live here.
        gradient_bytes: of their gradients.
        optimizer_bytes: of what the optimizer keeps for them.
        buffer_bytes: of its buffers and constants.
        lent_bytes: of its copies of parameters that live elsewhere.
        activation_bytes: new memory that its forward's calls make.
        saved_bytes: what a micro-batch keeps from forward to backward.
        in_flight: how many micro-batches are kept at once, at most.
        peak_saved_bytes: what they keep together.
        peak_bytes: the most that micro-batches occupy at once, with what arrives and waits, what is
            made and goes while a phase runs, and the sums of gradients. (These are taken to be gone
            before the next forward, as `zero_grad` leaves it.)
        limit_bytes: what all of it may take; None: no limit was set.
    """

    first: str | None
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
    lent_bytes: int
    activation_bytes: int
    saved_bytes: int
    in_flight: int
    peak_saved_bytes: int
    peak_bytes: int
    limit_bytes: int | None

    @property
    def forward_seconds(self) -> float:
        """Of the largest micro-batch; so too the following."""
        return self.times[0].forward

    @property
    def backward_seconds(self) -> float:
        """Gradients of what was received and of the stage's parameters."""
        return self.times[0].backward + self.times[0].weight

    @property
    def recompute_seconds(self) -> float:
        """What is made again before the backward."""
        return self.times[0].recompute

    @property
    def seconds(self) -> float:
        """One micro-batch, forward and backward."""
        return self.times[0].work

    @property
    def static_bytes(self) -> int:
        """What is there whether a step runs or not."""
        own = self.parameter_bytes + self.optimizer_bytes
        return own + self.buffer_bytes + self.lent_bytes

    @property
    def memory_bytes(self) -> int:
        """All that the stage needs on its device."""
        return self.static_bytes + self.peak_bytes
