"""`Plan`: who runs what, as plain data that prints, is saved as JSON, and is read back.

A plan names calls of the captured graph and holds numbers; no tensors, no graphs, no devices. So
the plan of one machine can be used on another: ``autopipe.compile(model, plan="plan.json")``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from autopipe.errors import PlanError, VerifyError, require
from autopipe.passes.schedule import KNOWN
from autopipe.passes.simulate import Timeline, simulate
from autopipe.report.table import table
from autopipe.typed_json import MisfitError, convert, parse, short, to_json

if TYPE_CHECKING:
    from os import PathLike

FORMAT, VERSION = "autopipe plan", 1
LARGEST_FILE = 64 * 2**20
"""Bytes; the plan of a model with ten thousand boundary tensors has two million."""


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
class StagePlan:
    """What one stage does; times and sizes are those of the largest micro-batch.

    Attributes:
        first: name of its first call in the captured graph; None if it has no call.
        calls: how many calls of the captured graph it makes.
        device: where it was planned to run, in words.
        parameters: qualified names of the parameters that live here.
        flops: of its forward.
        forward_seconds, backward_seconds, recompute_seconds: predicted.
        parameter_bytes: of the parameters that live here.
        activation_bytes: new memory that its forward's calls make.
        saved_bytes: what a micro-batch keeps from forward to backward.
        in_flight: how many micro-batches are kept at once, at most.
        peak_saved_bytes: what they keep together.
    """

    first: str | None
    calls: int
    device: str
    parameters: tuple[str, ...]
    flops: int
    forward_seconds: float
    backward_seconds: float
    recompute_seconds: float
    parameter_bytes: int
    activation_bytes: int
    saved_bytes: int
    in_flight: int
    peak_saved_bytes: int

    @property
    def seconds(self) -> float:
        """One micro-batch, forward and backward."""
        return self.forward_seconds + self.backward_seconds + self.recompute_seconds


@dataclass(frozen=True)
class Plan:
    """Who runs what.

    Attributes:
        model: class of the model.
        training: the mode that it was captured in.
        graph: fingerprint of the captured graph.
        schedule: name of the schedule.
        remat: rematerialization policy.
        chunks: M, the number of micro-batches of a batch that is large enough.
        sizes: samples in each micro-batch of the batch that was planned for.
        stages: K stages.
        crossings: the tensors that stages receive from the caller and from one another.
        notes: what capture did that a reader should know.
    """

    model: str
    training: bool
    graph: str
    schedule: str
    remat: str
    chunks: int
    sizes: tuple[int, ...]
    stages: tuple[StagePlan, ...]
    crossings: tuple[Crossing, ...]
    notes: tuple[str, ...]

    @property
    def starts(self) -> tuple[str, ...]:
        """The first call of each stage but the first."""
        return tuple(s.first for s in self.stages[1:] if s.first is not None)

    @cached_property
    def timeline(self) -> Timeline:
        """One training step as the simulator plays it, in seconds. Transfers are taken as free."""
        return simulate(
            self.schedule,
            stages=len(self.stages),
            chunks=len(self.sizes),
            forward=[s.forward_seconds for s in self.stages],
            backward=[s.backward_seconds for s in self.stages],
            recompute=[s.recompute_seconds for s in self.stages],
        )

    @property
    def balance(self) -> float:
        """Mean stage over largest stage, by predicted time."""
        seconds = [s.seconds for s in self.stages]
        return sum(seconds) / len(seconds) / max(seconds) if max(seconds) else 1.0

    def __str__(self) -> str:
        return table(self)

    def verify(self) -> None:
        """Check what its types do not say.

        Raises:
            VerifyError: a count, a time or a stage number that cannot be.
        """
        K = len(self.stages)
        require(K > 0, "a plan without stages")
        require(0 < len(self.sizes) <= self.chunks, "micro-batches and sizes disagree")
        require(min(self.sizes) > 0, "a micro-batch without samples")
        require(self.schedule in KNOWN, "an unknown schedule", found=self.schedule)
        for k, stage in enumerate(self.stages):
            for field in fields(stage):
                value = getattr(stage, field.name)
                if isinstance(value, (int, float)):
                    require(value >= 0, f"stages[{k}].{field.name} is negative", found=str(value))
            empty = stage.first is None
            require(empty == (stage.calls == 0), f"stages[{k}]: `first` and `calls` disagree")
            require(not empty or K == 1, f"stages[{k}] has no call")
        names = [s.first for s in self.stages]
        require(len(set(names)) == K, "two stages start at one call", found=str(names))
        for crossing in self.crossings:
            where = f"crossing {crossing.name!r}"
            require(crossing.nbytes >= 0, f"{where} has a negative size")
            first = 0 if crossing.source is None else crossing.source + 1
            require(first >= 0, f"{where} comes from no stage", found=str(crossing.source))
            for k in crossing.targets:
                require(first <= k < K, f"{where} does not flow to a later stage", found=str(k))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON.

        Raises:
            OSError: the file cannot be written.
        """
        text = to_json(_File(FORMAT, VERSION, self))
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan that `save` wrote. Nothing in the file is executed.

        Raises:
            PlanError: it is no plan, of another version, or contradicts itself.
            OSError: the file cannot be read.
        """
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise PlanError("the file is too large for a plan", source=str(path))
        try:
            data = parse(content.decode("utf-8"))
            known = (data.get("format"), data.get("version")) if isinstance(data, dict) else None
            if known != (FORMAT, VERSION):
                raise MisfitError("", f"format {FORMAT!r}, version {VERSION}", short(known))
            plan: Plan = convert(_File, data, "").plan
            plan.verify()
        except UnicodeDecodeError as error:
            raise PlanError("not a plan", source=str(path), found=str(error)) from error
        except MisfitError as error:
            raise PlanError(
                f"not a plan: {error.where} cannot be read" if error.where else "not a plan",
                source=str(path),
                expected=error.expected,
                found=error.found,
            ) from error
        except VerifyError as error:
            raise PlanError(
                f"a plan that cannot be: {error.problem}", source=str(path), found=error.found
            ) from error
        return plan


@dataclass(frozen=True)
class _File:
    format: str
    version: int
    plan: Plan
