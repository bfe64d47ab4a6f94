"""`Plan`: which stage runs what, as plain data that can be printed, saved as JSON and loaded.

A plan has names of ops of the captured graph, and numbers, but no tensors, graphs or devices. So a
plan from one machine can be used on another: ``autopipe.compile(model, plan="plan.json")``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autopipe.errors import PlanError, VerifyError, require
from autopipe.passes.remat_policies import parse_policy, policy_options
from autopipe.passes.schedule import KINDS
from autopipe.planning.plan_data import PlanData
from autopipe.report.plan_text import plan_text
from autopipe.typed_json import MisfitError, convert, parse, short, to_json

if TYPE_CHECKING:
    from os import PathLike

FORMAT, VERSION = "autopipe plan", 3
LARGEST_FILE = 64 * 2**20
"""Largest file, in bytes. (A plan with ten thousand boundary tensors has two million.)"""


@dataclass(frozen=True)
class Plan(PlanData):
    """Which stage runs what: `PlanData` that can be printed, checked, saved and loaded."""

    def is_of(self, other: Plan) -> bool:
        """Whether another plan is the same, apart from times and peak memory."""

        def what(plan: Plan) -> Plan:
            stages = tuple(replace(s, times=(), speeds="", peak_bytes=0) for s in plan.stages)
            return replace(
                plan, stages=stages, bound_seconds=None, cut_seconds=None, gather_seconds=0.0
            )

        return what(self) == what(other)

    def __str__(self) -> str:
        return plan_text(self)

    def verify(self) -> None:
        """Check the rules that types do not express.

        Raises:
            VerifyError: a count, a time or a stage number is impossible.
        """
        K = len(self.stages)
        require(K > 0, "a plan without stages")
        require(0 < len(self.sizes) <= self.chunks, "micro-batches and sizes disagree")
        require(not self.whole or len(self.sizes) == 1, "a whole batch in several micro-batches")
        require(min(self.sizes) > 0, "a micro-batch without samples")
        kinds = f"one of {', '.join(KINDS)}"
        require(self.schedule in KINDS, "an unknown schedule", expected=kinds, found=self.schedule)
        require(
            KINDS[self.schedule].virtual_stages == 1,
            "a schedule with several stages on a device",
            found=self.schedule,
        )
        for name in ("bound_seconds", "cut_seconds", "gather_seconds"):
            require((getattr(self, name) or 0) >= 0, f"{name} is negative")
        for k, stage in enumerate(self.stages):
            where = f"stages[{k}]"
            counts = len(stage.times) == len(set(self.sizes))
            require(counts, f"{where}: one of `times` for each size", found=str(len(stage.times)))
            facts = [(f"{where}.{n}", v) for n, v in vars(stage).items()]
            facts += [(f"{where}.times.{n}", v) for t in stage.times for n, v in vars(t).items()]
            for name, value in facts:
                if isinstance(value, (int, float)):
                    require(value >= 0, f"{name} is negative", found=str(value))
            require(
                parse_policy(stage.remat) is not None,
                f"{where}.remat is an unknown policy",
                expected=f"one of {', '.join(policy_options())}",
                found=stage.remat,
            )
            empty = stage.first is None
            require(empty == (stage.calls == 0), f"stages[{k}]: `first` and `calls` disagree")
            require(not empty or K == 1, f"stages[{k}] has no call")
        for stages in ([s.stage for s in self.segments], *[r.stages for r in self.duplicated]):
            require(all(0 <= k < K for k in stages), "a call in no stage", found=str(stages))
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

        Args:
            path: of the file.

        Raises:
            OSError: the file cannot be written.
        """
        text = to_json(_File(FORMAT, VERSION, self))
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan that `save` wrote. Nothing in the file is executed.

        Args:
            path: of the file.

        Raises:
            PlanError: the file is not a plan, has another version, or contradicts itself.
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
                f"a plan that cannot be: {error.problem}",
                source=str(path),
                expected=error.expected,
                found=error.found,
            ) from error
        return plan


@dataclass(frozen=True)
class _File:
    format: str
    version: int
    plan: Plan
