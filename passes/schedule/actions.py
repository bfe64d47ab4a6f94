"""Who does what, in which order: a schedule is data, one list of actions per device.

Kept apart from running it, a schedule can be printed, checked for deadlocks and timed (`simulate`)
before a device is touched, and the runtime needs no notion of "GPipe": it executes lists.

An action is a micro-batch's visit to a stage. Its phase is written with the letters of the work it
does: F forward, R rematerialize, B gradients of the stage's inputs, W gradients of its parameters;
`RBW` is a whole backward in one go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from autopipe.errors import VerifyError

_PHASES = frozenset(("F", "R", "B", "W", "RB", "BW", "RBW"))


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
        waits = waits_for(self.phase, self.stage, stages)
        return tuple(Action(letter, stage, self.microbatch) for letter, stage in waits)


def waits_for(phase: str, stage: int, stages: int) -> tuple[tuple[str, int], ...]:
    """`Action.needs` without the micro-batch, which is always the action's own: (letter, stage)."""
    wanted = {
        "F": [("F", stage - 1)],
        "R": [("F", stage)],
        "B": [("F", stage), ("R", stage), ("B", stage + 1)],
        "W": [("B", stage)],
    }
    needs = [
        (letter, other)
        for own in phase
        for letter, other in wanted[own]
        if 0 <= other < stages and not (other == stage and letter in phase)
    ]
    return tuple(dict.fromkeys(needs))


@dataclass(frozen=True)
class Scheduled:
    """A schedule: what each device executes, in order.

    Attributes:
        kind: its name, such as "gpipe".
        stages: the number of stages, of which a device may hold several.
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
        waits = {
            one: waits_for(*one, self.stages)
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
        """Check that every micro-batch visits every stage once per phase, that each stage's
        gradients come in the order of the micro-batches, and that nothing waits forever when each
        device executes its list in order.

        Raises:
            VerifyError: naming the device and the action.
        """
        self.in_order()

    def in_order(self) -> list[tuple[int, Action]]:
        """All of `runnable`, verified; for those who need both.

        Raises:
            VerifyError: as `verify`.
        """
        trains = any(action.phase != "F" for row in self.devices for action in row)
        done: dict[tuple[str, int], list[int]] = {}
        home: dict[int, int] = {}
        for device, actions in enumerate(self.devices):
            for action in actions:
                where = f"{action} on device {device}"
                if action.phase not in _PHASES:
                    raise VerifyError(f"{where} has an unknown phase", found=repr(action.phase))
                if not (0 <= action.stage < self.stages and 0 <= action.microbatch < self.chunks):
                    size = f"{self.stages} stages, {self.chunks} micro-batches"
                    raise VerifyError(f"{where} is out of range", expected=size)
                if home.setdefault(action.stage, device) != device:
                    found = f"also on device {home[action.stage]}"
                    raise VerifyError(f"{where}: a stage lives on one device", found=found)
                for letter in action.phase:
                    done.setdefault((letter, action.stage), []).append(action.microbatch)
        self._verify_visits("FRBW" if trains else "F", done, home)
        order = list(self.runnable())
        self._verify_progress(order)
        return order

    def _verify_visits(
        self, letters: str, done: dict[tuple[str, int], list[int]], home: dict[int, int]
    ) -> None:
        """Each micro-batch once per stage and phase; gradients in the order that eager adds in."""
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
                        raise VerifyError(f"{one} is on no device", expected="once")
                    if count[m] > 1:
                        where = f"{self._last(one)} on device {home[stage]}"
                        raise VerifyError(f"{where} does {one} again", expected="once")
                if letter in "BW":
                    m = next(m for m, turn in zip(found, every, strict=True) if m != turn)
                    where = f"{self._last(Action(letter, stage, m))} on device {home[stage]}"
                    raise VerifyError(
                        f"{where} is out of turn: gradients add up in the order of micro-batches",
                        expected=f"{letter} of 0..{self.chunks - 1} in that order",
                        found=", ".join(map(str, found)),
                    )

    def _last(self, one: Action) -> Action:
        """The last action that does `one`, which is a single letter."""
        return next(
            action
            for row in self.devices
            for action in reversed(row)
            if (action.stage, action.microbatch) == (one.stage, one.microbatch)
            and one.phase in action.phase
        )

    def _verify_progress(self, order: list[tuple[int, Action]]) -> None:
        """All actions are in the order, or some device waits forever."""
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
        """Per stage, the most micro-batches whose forward is done and whose backward is not.

        A backward is done when its W is. That many sets of saved values are alive at once: M with
        GPipe, min(K - k, M) at stage k with 1F1B. Without a backward nothing is kept and all are 0.
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
