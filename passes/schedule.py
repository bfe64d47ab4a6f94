"""Who does what, in which order: a schedule is data, one list of actions per device.

Kept apart from running it, a schedule can be printed, checked for deadlocks and timed (`simulate`)
before a device is touched, and the runtime needs no notion of "GPipe": it executes lists.

An action is a micro-batch's visit to a stage. Its phase is written with the letters of the work it
does: F forward, R rematerialize, B gradients of the stage's inputs, W gradients of its parameters;
`RBW` is a whole backward in one go. Every order made here runs micro-batches 0..M-1 backward in
that same order, so that gradients add up in eager's order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from autopipe.errors import OptionError, UnsupportedError, VerifyError

IMPLEMENTED = ("gpipe", "1f1b")
KNOWN = (*IMPLEMENTED, "interleaved", "zb-h1", "zb-h2", "zb-v")


@dataclass(frozen=True, order=True)
class Action:
    """One micro-batch's work at one stage, printed as ``F2.0``: phase F, stage 2, micro-batch 0.

    Attributes:
        phase: "F", or letters of "RBW" that stand together there.
        stage: index of the stage, 0..K-1.
        microbatch: index of the micro-batch, 0..M-1.
    """

    phase: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.phase}{self.stage}.{self.microbatch}"

    def needs(self, stages: int) -> tuple[Action, ...]:
        """What must be done before this can run in a pipeline of K stages, one letter each.

        F waits for F of the stage before; R for its own F; B for its own R and for B of the stage
        after; W for its own B. What the action does itself it does not wait for.
        """
        k, m = self.stage, self.microbatch
        wanted = {
            "F": [("F", k - 1)],
            "R": [("F", k)],
            "B": [("F", k), ("R", k), ("B", k + 1)],
            "W": [("B", k)],
        }
        needs = [
            Action(letter, stage, m)
            for own in self.phase
            for letter, stage in wanted[own]
            if 0 <= stage < stages and not (stage == k and letter in self.phase)
        ]
        return tuple(dict.fromkeys(needs))


@dataclass(frozen=True)
class Scheduled:
    """A schedule: what each device executes, in order.

    Attributes:
        kind: its name, such as "gpipe".
        stages: K, the number of stages.
        chunks: M, the number of micro-batches.
        devices: one list of actions per device.
    """

    kind: str
    stages: int
    chunks: int
    devices: tuple[tuple[Action, ...], ...]

    def runnable(self) -> Iterator[tuple[int, Action]]:
        """(device, action) pairs in an order that meets every need and every device's own order.

        Ends early if no device can go on: `verify` makes that an error.
        """
        done: set[Action] = set()
        at = [0] * len(self.devices)
        moved = True
        while moved:
            moved = False
            for device, actions in enumerate(self.devices):
                while at[device] < len(actions):
                    action = actions[at[device]]
                    if not done.issuperset(action.needs(self.stages)):
                        break
                    done.update(Action(p, action.stage, action.microbatch) for p in action.phase)
                    at[device] += 1
                    moved = True
                    yield device, action

    def verify(self) -> None:
        """Check that every micro-batch visits every stage once per phase, and that nothing waits
        forever when each device executes its list in order.

        Raises:
            VerifyError: naming the device and the action.
        """
        backward = "RBW" if any(a.phase != "F" for row in self.devices for a in row) else ""
        count: Counter[Action] = Counter()
        home: dict[int, int] = {}
        for device, actions in enumerate(self.devices):
            for action in actions:
                where = f"{action} on device {device}"
                if not action.phase or action.phase not in ("F", *_parts("RBW")):
                    raise VerifyError(f"{where} has an unknown phase", found=repr(action.phase))
                if not (0 <= action.stage < self.stages and 0 <= action.microbatch < self.chunks):
                    size = f"{self.stages} stages, {self.chunks} micro-batches"
                    raise VerifyError(f"{where} is out of range", expected=size)
                if home.setdefault(action.stage, device) != device:
                    found = f"also on device {home[action.stage]}"
                    raise VerifyError(f"{where}: a stage lives on one device", found=found)
                for letter in action.phase:
                    one = Action(letter, action.stage, action.microbatch)
                    count[one] += 1
                    if count[one] > 1:
                        raise VerifyError(f"{where} does {one} again", expected="once")
        for stage in range(self.stages):
            for m in range(self.chunks):
                for letter in "F" + backward:
                    if not count[one := Action(letter, stage, m)]:
                        raise VerifyError(f"{one} is on no device", expected="once")
        done = Counter(device for device, _ in self.runnable())
        for device, actions in enumerate(self.devices):
            if done[device] < len(actions):
                stuck = actions[done[device]]
                raise VerifyError(
                    f"device {device} can never run {stuck}",
                    expected="before it: " + ", ".join(map(str, stuck.needs(self.stages))),
                    found="; ".join(
                        f"device {other} waits at {row[done[other]]}"
                        for other, row in enumerate(self.devices)
                        if done[other] < len(row)
                    ),
                )

    def in_flight(self) -> tuple[int, ...]:
        """Per stage, the most micro-batches whose forward is done and whose backward is not.

        That many sets of saved values are alive at once: M with GPipe, min(K - k, M) at stage k
        with 1F1B. Without a backward nothing is kept and all are 0.
        """
        now, most = [0] * self.stages, [0] * self.stages
        if not any("W" in action.phase for row in self.devices for action in row):
            return tuple(most)
        for actions in self.devices:
            for action in actions:
                now[action.stage] += (action.phase == "F") - ("W" in action.phase)
                most[action.stage] = max(most[action.stage], now[action.stage])
        return tuple(most)

    def __str__(self) -> str:
        width = max((len(str(action)) for row in self.devices for action in row), default=0)
        title = f"{self.kind}: {self.stages} stages, {self.chunks} micro-batches"
        rows = [
            f"device {device:<3} " + " ".join(f"{action!s:{width}}" for action in actions)
            for device, actions in enumerate(self.devices)
        ]
        return "\n".join(row.rstrip() for row in [title, *rows])


def schedule(kind: str, stages: int, chunks: int, *, backward: bool = True) -> Scheduled:
    """The actions of one step, stage k on device k.

    "gpipe" (arXiv 1811.06965, section 2.2) runs all micro-batches forward, then all backward.
    "1f1b" (PipeDream-Flush, arXiv 2006.09503) starts a backward as soon as it can:
    stage k runs min(K - 1 - k, M) forwards to fill the pipeline, then alternates.

    Args:
        kind: "gpipe" or "1f1b".
        stages: K >= 1.
        chunks: M >= 1 micro-batches.
        backward: False leaves the forward actions only (inference).

    Raises:
        OptionError: an unknown kind, or a count below 1.
        UnsupportedError: a kind that is known and not implemented.
    """
    if kind not in KNOWN:
        names = ", ".join(map(repr, KNOWN))
        raise OptionError("there is no such schedule", expected=f"one of {names}", found=repr(kind))
    if kind not in IMPLEMENTED:
        names = " or ".join(map(repr, IMPLEMENTED))
        raise UnsupportedError(f"schedule {kind!r} is not implemented", remedy=f"use {names}")
    for what, count in (("stages", stages), ("chunks", chunks)):
        if count < 1:
            raise OptionError("no such pipeline", expected=f"{what} >= 1", found=str(count))
    devices = []
    for stage in range(stages):
        forwards = [Action("F", stage, m) for m in range(chunks)]
        backwards = [Action("RBW", stage, m) for m in range(chunks)] if backward else []
        ahead = min(stages - 1 - stage, chunks) if kind == "1f1b" and backward else chunks
        steady = zip(forwards[ahead:], backwards, strict=False)
        actions = forwards[:ahead] + [action for pair in steady for action in pair]
        devices.append((*actions, *backwards[chunks - ahead :]))
    return Scheduled(kind, stages, chunks, tuple(devices))


def _parts(phases: str) -> list[str]:
    """Every run of letters that stand together."""
    ends = range(1, len(phases) + 1)
    return [phases[start:end] for end in ends for start in range(end)]
