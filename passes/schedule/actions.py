"""A schedule is data: one list of actions per device.

So it can be printed, checked for deadlocks and timed (`simulate`) before any device is used, and
the runtime only executes lists: it does not know what "GPipe" means.

An action is one micro-batch's work at one stage. Its phase is a string of letters: F forward,
R rematerialization, B gradients of the stage's inputs, W gradients of its parameters. `RBW` is a
whole backward in one action.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from autopipe.errors import VerifyError, shown

PHASES = ("F", "R", "B", "W", "RB", "BW", "RBW")
"""What an action can be."""


@dataclass(frozen=True, order=True)
class Action:
    """One micro-batch's work at one stage, printed as ``F2.0``: phase F, stage 2, micro-batch 0.

    Attributes:
        phase: "F", or adjacent letters of "RBW".
        stage: index of the stage, 0..K-1.
        microbatch: index of the micro-batch, 0..M-1.
    """

    phase: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.phase}{self.stage}.{self.microbatch}"

    def needs(self, stages: int) -> tuple[Action, ...]:
        """The actions that must finish before this one, one letter each.

        F waits for F of the previous stage; R for F of its own stage; B for F and R of its own
        stage and B of the next stage; W for B of its own stage. An action does not wait for a phase
        that it contains.

        Args:
            stages: K, the number of stages of the pipeline.
        """
        found = dependencies(self.phase, self.stage, stages)
        return tuple(Action(letter, stage, self.microbatch) for letter, stage in found)


def dependencies(phase: str, stage: int, stages: int) -> tuple[tuple[str, int], ...]:
    """`Action.needs` as (letter, stage) pairs; the micro-batch is always the action's own.

    Args:
        phase: of the action.
        stage: of the action.
        stages: K, the number of stages of the pipeline.
    """
    before = {
        "F": [("F", stage - 1)],
        "R": [("F", stage)],
        "B": [("F", stage), ("R", stage), ("B", stage + 1)],
        "W": [("B", stage)],
    }
    needs = [
        (letter, other)
        for own in phase
        for letter, other in before[own]
        if 0 <= other < stages and not (other == stage and letter in phase)
    ]
    return tuple(dict.fromkeys(needs))


@dataclass(frozen=True)
class Scheduled:
    """A schedule: what each device executes, in order.

    Attributes:
        kind: name of the schedule kind.
        stages: the number of stages; a device may have several.
        chunks: M, the number of micro-batches.
        devices: for each device its actions, in order.
    """

    kind: str
    stages: int
    chunks: int
    devices: tuple[tuple[Action, ...], ...]

    def forwards_first(self) -> Scheduled:
        """The same, but each device runs all its forwards before any other action.

        The caller's loss can then stand between the forwards and the backwards.
        """
        rows = (sorted(row, key=lambda action: action.phase != "F") for row in self.devices)
        return replace(self, devices=tuple(map(tuple, rows)))

    def execution_order(self) -> Iterator[tuple[int, Action]]:
        """(device, action) pairs in an order that respects dependencies and each device's list.

        Stops early on a deadlock, which `verify` reports as an error.
        """
        waits = {
            one: dependencies(*one, self.stages)
            for one in {(action.phase, action.stage) for row in self.devices for action in row}
        }
        done: set[tuple[str, int, int]] = set()
        left = [iter(actions) for actions in self.devices]
        heads = [next(actions, None) for actions in left]
        moved = True
        while moved:
            moved = False
            for device, action in enumerate(heads):
                while action is not None:
                    phase, stage, m = action.phase, action.stage, action.microbatch
                    if not done.issuperset([(letter, k, m) for letter, k in waits[phase, stage]]):
                        break
                    done.update([(letter, stage, m) for letter in phase])
                    moved = True
                    yield device, action
                    action = heads[device] = next(left[device], None)

    def verify(self) -> None:
        """Check that every device has actions, that every micro-batch visits every stage once per
        phase, that each stage adds up gradients in the order of micro-batches, and that there is no
        deadlock when each device executes its list in order.

        Micro-batches may differ in how their phases are cut into actions (RBW, or RB and W), and a
        stage's forwards may run in any order: nothing is added up there. Generated code wants the
        forwards in order too.

        Raises:
            VerifyError: naming the device and the action.
        """
        self.verified_order()

    def verified_order(self) -> list[tuple[int, Action]]:
        """Verify the schedule and return all of `execution_order`.

        Raises:
            VerifyError: as `verify`.
        """
        for what, count in (("stages", self.stages), ("micro-batches", self.chunks)):
            if not _is_index(count) or count < 1:
                expected = "an integer >= 1"
                raise VerifyError(f"the number of {what}", expected=expected, found=shown(count))
        done: dict[tuple[str, int], list[int]] = {}
        home: dict[int, int] = {}
        for device, actions in enumerate(self.devices):
            if not isinstance(actions, tuple):
                found = shown(actions)
                raise VerifyError(f"device {device}", expected="a tuple of actions", found=found)
            if not actions:
                raise VerifyError(f"device {device} runs nothing", expected="at least one action")
            for action in actions:
                self._verify_action(action, device)
                if home.setdefault(action.stage, device) != device:
                    where, found = f"{action} on device {device}", f"on device {home[action.stage]}"
                    raise VerifyError(f"{where}: a stage must be on one device", found=found)
                for letter in action.phase:
                    done.setdefault((letter, action.stage), []).append(action.microbatch)
        trains = any(letter != "F" for letter, _ in done)
        # B before R: who lists no R has one in each B.
        self._verify_visits("FBRW" if trains else "F", done, home)
        order = list(self.execution_order())
        self._verify_progress(order)
        return order

    def _verify_action(self, action: object, device: int) -> None:
        """An `Action` with a known phase, of a stage and a micro-batch that exist."""
        if not isinstance(action, Action):
            where = f"an entry of device {device}"
            raise VerifyError(where, expected="an Action", found=shown(action))
        where, stage, m = f"{action} on device {device}", action.stage, action.microbatch
        if not isinstance(action.phase, str) or action.phase not in PHASES:
            expected = f"one of {', '.join(PHASES)}"
            raise VerifyError(
                f"{where} has an unknown phase", expected=expected, found=shown(action.phase)
            )
        if not (_is_index(stage) and _is_index(m)):
            raise VerifyError(f"{where}", expected="integers", found=shown((stage, m)))
        if not (0 <= stage < self.stages and 0 <= m < self.chunks):
            size = f"{self.stages} stages, {self.chunks} micro-batches"
            raise VerifyError(f"{where} is out of range", expected=size)

    def _verify_visits(
        self, letters: str, done: dict[tuple[str, int], list[int]], home: dict[int, int]
    ) -> None:
        """Each micro-batch once per stage and phase; gradients in the order of micro-batches."""
        every = list(range(self.chunks))
        for stage in range(self.stages):
            for letter in letters:
                found = done.get((letter, stage), [])
                if found == every:
                    continue
                count = Counter(found)
                for m in every:
                    one = Action(letter, stage, m)
                    if not count[m]:
                        where = f"on device {home[stage]}" if stage in home else "on any device"
                        raise VerifyError(f"{one} is not scheduled {where}", expected="once")
                    if count[m] > 1:
                        where = f"{self._last(one)} on device {home[stage]}"
                        raise VerifyError(f"{where} repeats {one}", expected="once")
                if letter in "BW":
                    m = next(m for m, turn in zip(found, every, strict=True) if m != turn)
                    where = f"{self._last(Action(letter, stage, m))} on device {home[stage]}"
                    raise VerifyError(
                        f"{where} is out of order: gradients add up in the order of micro-batches",
                        expected=f"{letter} of 0..{self.chunks - 1} in that order",
                        found=", ".join(map(str, found)),
                    )

    def _last(self, one: Action) -> Action:
        """The last action that contains `one`, a single letter."""
        return next(
            action
            for row in self.devices
            for action in reversed(row)
            if (action.stage, action.microbatch) == (one.stage, one.microbatch)
            and one.phase in action.phase
        )

    def _verify_progress(self, order: list[tuple[int, Action]]) -> None:
        """Raise if some action is not in the order: its device would wait forever."""
        done = Counter(device for device, _ in order)
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
        """For each stage, the largest number of micro-batches between forward and backward.

        A backward ends with its W. That many sets of saved activations are alive at once: M with
        GPipe, min(K - k, M) at stage k with 1F1B. 0 for inference, which saves nothing.
        """
        now, most = [0] * self.stages, [0] * self.stages
        if not any("W" in action.phase for row in self.devices for action in row):
            return tuple(most)
        for actions in self.devices:
            for action in actions:
                now[action.stage] += (action.phase == "F") - ("W" in action.phase)
                most[action.stage] = max(most[action.stage], now[action.stage])
        return tuple(most)

    def device_in_flight(self) -> tuple[int, ...]:
        """For each device, the most pairs of stage and micro-batch between F and W at once.

        With v stages per device, v of them are what a device keeps of one whole micro-batch. 0 for
        inference, as `in_flight`.
        """
        most = []
        for actions in self.devices:
            trains = any("W" in action.phase for action in actions)
            changes = [(a.phase == "F") - ("W" in a.phase) for a in actions] if trains else []
            most.append(max(accumulate(changes), default=0))
        return tuple(most)

    def __str__(self) -> str:
        width = max((len(str(action)) for row in self.devices for action in row), default=0)
        title = f"{self.kind}: {self.stages} stages, {self.chunks} micro-batches"
        rows = [
            f"device {device:<3} " + " ".join(f"{action!s:{width}}" for action in actions)
            for device, actions in enumerate(self.devices)
        ]
        return "\n".join(row.rstrip() for row in [title, *rows])


def _is_index(value: object) -> bool:
    """Whether it is an integer, as generated code must have it: no bool, no 1.0."""
    return isinstance(value, int) and not isinstance(value, bool)
