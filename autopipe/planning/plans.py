"""`Plan`: which stage runs what, as plain data that can be printed, saved as JSON and loaded.

A plan has names of ops of the captured graph, and numbers, but no tensors, graphs or devices. So a
plan from one machine can be used on another: ``autopipe.compile(model, plan="plan.json")``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autopipe.errors import OptionError, PlanError, VerifyError, printable, require
from autopipe.passes.remat_policies import parse_policy, policy_options
from autopipe.passes.schedule import KINDS
from autopipe.planning.plan_data import PlanData
from autopipe.planning.plan_parts import BOUNDARY_KINDS, EACH, ONCE
from autopipe.report.plan_text import plan_html, plan_summary, plan_text
from autopipe.typed_json import LARGEST_FILE, MisfitError, convert, parse, short, to_json

if TYPE_CHECKING:
    from os import PathLike

    from autopipe.planning.plan_parts import Crossing, StagePlan

FORMAT, VERSION = "autopipe plan", 8

MOST_STAGES = 1024
"""Stages of a plan in a file."""

MOST_WORK = 2**16
"""Stages times micro-batches of a plan in a file: so the timeline takes seconds, not minutes."""

LONGEST = 1e15
"""Seconds of a time in a file."""


@dataclass(frozen=True, repr=False)
class Plan(PlanData):
    """Which stage runs what: `PlanData` that can be printed, checked, saved and loaded."""

    def is_of(self, other: Plan) -> bool:
        """Whether another plan is the same, apart from times and peak memory."""

        def what(plan: Plan) -> Plan:
            stages = tuple(
                replace(s, modules="", times=(), speeds="", peak_bytes=0, limit_bytes=None)
                for s in plan.stages
            )
            return replace(
                plan,
                stages=stages,
                totals=(),
                notes=(),
                bound_seconds=None,
                cut_seconds=None,
                gather_seconds=0.0,
            )

        return what(self) == what(other)

    def __str__(self) -> str:
        return plan_text(self)

    def __repr__(self) -> str:
        """One line; `print` the plan for its table."""
        return f"Plan({printable(plan_summary(self))})"

    def _repr_html_(self) -> str:
        return plan_html(self)

    def verify(self) -> None:
        """Check the rules that types do not express.

        Raises:
            VerifyError: a count, a time or a stage number is impossible.
        """
        K, distinct = len(self.stages), len(set(self.sizes))
        require(K > 0, "a plan without stages")
        require(0 < len(self.sizes) <= self.chunks, "micro-batches and sizes disagree")
        require(not self.whole or self.chunks == 1, "a whole batch in several micro-batches")
        require(min(self.sizes) > 0, "a micro-batch without samples")
        _verify_schedule(self)
        for name in ("bound_seconds", "cut_seconds", "gather_seconds"):
            require((getattr(self, name) or 0) >= 0, f"{name} is negative")
        for k, stage in enumerate(self.stages):
            where, empty = f"stages[{k}]", stage.first is None
            _verify_stage(stage, where, distinct)
            require(empty == (stage.calls == 0), f"{where}: `first` and `calls` disagree")
        for stages in ([s.stage for s in self.segments], *[r.stages for r in self.duplicated]):
            require(all(0 <= k < K for k in stages), "a call in no stage", found=short(stages))
        names = [s.first for s in self.stages if s.first is not None]
        require(len(set(names)) == len(names), "two stages start at one call", found=short(names))
        for crossing in self.crossings:
            _verify_crossing(crossing, K)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON.

        Args:
            path: of the file.

        Raises:
            PlanError: `load` would refuse the file; it says why.
            OSError: the file cannot be written.
        """
        try:
            content = to_json(_File(FORMAT, VERSION, self)).encode() + b"\n"
            _read(content)
        except (MisfitError, VerifyError, ValueError) as error:
            raise _refusal(error, None) from error
        Path(path).write_bytes(content)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan that `save` wrote. Nothing in the file is executed.

        Args:
            path: of the file.

        Raises:
            PlanError: the file is not a plan, has another version, contradicts itself, or is beyond
                a limit: those of this file, and of `autopipe.typed_json`.
            OSError: the file cannot be read.
        """
        try:
            with Path(path).open("rb") as file:
                content = file.read(LARGEST_FILE + 1)
        except ValueError as error:  # a path with NUL
            raise PlanError("not the path of a file", source=str(path), found=str(error)) from error
        try:
            return _read(content)
        except (MisfitError, VerifyError) as error:
            raise _refusal(error, str(path)) from error


@dataclass(frozen=True)
class _File:
    format: str
    version: int
    plan: Plan


def _read(content: bytes) -> Plan:
    """Parse and check the content of a file.

    Raises:
        MisfitError: it is not a plan of this version, or beyond a limit.
        VerifyError: it contradicts itself.
    """
    data = parse(content)
    known = (data.get("format"), data.get("version")) if isinstance(data, dict) else None
    if known != (FORMAT, VERSION):
        raise MisfitError("", f"format {FORMAT!r}, version {VERSION}", short(known))
    plan: Plan = convert(_File, data, "").plan
    K, M = len(plan.stages), len(plan.sizes)
    if K > MOST_STAGES:
        raise MisfitError("plan.stages", f"at most {MOST_STAGES:,} stages", f"{K:,}")
    if K * M > MOST_WORK:
        limit = f"at most {MOST_WORK:,}: stages times micro-batches"
        raise MisfitError("plan.sizes", limit, f"{K:,} × {M:,}")
    plan.verify()
    times = [t for stage in plan.stages for times in stage.times for t in vars(times).values()]
    if max(plan.gather_seconds, plan.bound_seconds or 0, plan.cut_seconds or 0, *times) > LONGEST:
        raise MisfitError("plan", f"times of at most {LONGEST:.0e} seconds", "a longer one")
    return plan


def _refusal(error: ValueError | VerifyError, path: str | None) -> PlanError:
    """What is wrong with a file, or with a plan that is to be written (no path)."""
    what = "not a plan" if path is not None else "the plan cannot be saved"
    if isinstance(error, VerifyError):
        what = f"a plan that cannot be: {error.problem}"
        return PlanError(what, source=path, expected=error.expected, found=error.found)
    if isinstance(error, MisfitError):
        what += f": {error.where} cannot be read" * bool(error.where)
        return PlanError(what, source=path, expected=error.expected, found=error.found)
    return PlanError(what, source=path, expected="finite numbers", found=str(error))


def _verify_schedule(plan: PlanData) -> None:
    """The rules of the schedule and its devices, which have one or more stages."""
    K = len(plan.stages)
    require(0 < plan.devices <= K, "more devices than stages", found=str(plan.devices))
    if plan.actions:
        try:
            own = plan.order
        except OptionError as error:
            raise VerifyError(error.problem, expected=error.expected, found=error.found) from error
        has = (own.stages, own.devices) == (K, plan.devices)
        require(has and own.kind.most_chunks == plan.chunks, "actions of another schedule")
    else:
        kinds, found = f"one of {', '.join(KINDS)}", short(plan.schedule)
        require(plan.schedule in KINDS, "an unknown schedule", expected=kinds, found=found)
        kind, (v, left) = KINDS[plan.schedule], divmod(K, plan.devices)
        has = left == 0 and (kind.any_virtual_stages or v == kind.virtual_stages)
        what = f"schedule {plan.schedule} does not have {K} stages on {plan.devices} devices"
        require(has, what)
    require(len(plan.totals) == plan.devices, "`totals` does not have an entry for each device")
    for d, total in enumerate(plan.totals):
        sizes = [n for n in vars(total).values() if n is not None]
        require(all(n >= 0 for n in sizes), f"totals[{d}] has a negative size")


def _verify_stage(stage: StagePlan, where: str, distinct: int) -> None:
    """The rules of one stage; `distinct` is the number of different sizes of micro-batches."""
    counts = len(stage.times) == distinct
    require(counts, f"{where}: one of `times` for each size", found=str(len(stage.times)))
    facts = [(f"{where}.{n}", v) for n, v in vars(stage).items()]
    facts += [(f"{where}.times.{n}", v) for t in stage.times for n, v in vars(t).items()]
    for name, value in facts:
        if isinstance(value, (int, float)):
            require(value >= 0, f"{name} is negative", found=str(value))
    within = stage.offloaded_bytes <= stage.saved_bytes
    require(within, f"{where} offloads more than it saves", found=str(stage.offloaded_bytes))
    policies = f"one of {', '.join(policy_options())}"
    known = parse_policy(stage.remat) is not None
    problem = f"{where}.remat is an unknown policy"
    require(known, problem, expected=policies, found=short(stage.remat))


def _verify_crossing(crossing: Crossing, K: int) -> None:
    """The rules of one boundary tensor between K stages."""
    where = f"crossing {short(crossing.name)}"
    kinds = f"one of {', '.join(BOUNDARY_KINDS)}"
    found = short(crossing.kind)
    require(
        crossing.kind in BOUNDARY_KINDS,
        f"{where} is of an unknown kind",
        expected=kinds,
        found=found,
    )
    often = crossing.gradient in (None, EACH, ONCE)
    wanted, found = f"null, {EACH} or {ONCE}", short(crossing.gradient)
    require(often, f"{where} has an unknown `gradient`", expected=wanted, found=found)
    require(crossing.nbytes >= 0, f"{where} has a negative size")
    first = 0 if crossing.source is None else crossing.source + 1
    require(0 <= first <= K, f"{where} comes from no stage", found=str(crossing.source))
    for k in crossing.targets:
        require(first <= k < K, f"{where} does not flow to a later stage", found=str(k))
    once = len(set(crossing.targets)) == len(crossing.targets)
    require(once, f"{where} goes to a stage twice", found=short(crossing.targets))
