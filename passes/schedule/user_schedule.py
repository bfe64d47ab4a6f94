"""A user's own schedule: lists of actions, as text or tuples → `Scheduled`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from autopipe.errors import OptionError, VerifyError, shown

from .actions import PHASES, Action, Scheduled

Entry = Action | str | tuple[str, int, int]
"""An action as users write it: ``Action("BW", 0, 3)``, ``"BW0.3"`` or ``("BW", 0, 3)``."""

_TEXT = re.compile(r"([A-Za-z]+)([0-9]{1,9})\.([0-9]{1,9})")


def scheduled_from_lists(name: str, rows: Sequence[Sequence[Entry]]) -> Scheduled:
    """Make a schedule from what each device runs, in order.

    The letters are F (forward), R (rematerialization), B (gradients of inputs) and W (gradients of
    parameters), or RB, BW, RBW for several of them in one action. ``"B2.3"`` alone is therefore not
    a whole backward: ``"W2.3"`` must follow, somewhere. If there is no R anywhere, each B gets one,
    as its first part. A list of forwards alone is a schedule for inference.

    The number of stages and M follow from the largest indices. A stage may be on any device, and a
    device may have any number of stages.

    Args:
        name: of the schedule, for messages.
        rows: for each device its actions, each an `Action`, a text ``"F0.1"`` (letters, stage,
            micro-batch), or a tuple ``("F", 0, 1)``.

    Returns:
        The schedule, verified.

    Raises:
        OptionError: an entry is no action; or the schedule is not valid, as `Scheduled.verify`
            says, or runs the forwards of a stage out of order. The message names the device and
            the action, or where it is no action, its place in the row, from 0 on.
    """
    if not isinstance(name, str):
        raise OptionError("the name of a schedule", expected="a text", found=shown(name))
    what = f"schedule {name!r}"
    if not isinstance(rows, (list, tuple)) or not rows:
        expected = "a list with a list of actions for each device"
        raise OptionError(what, expected=expected, found=shown(rows))
    found = [list(_actions(what, device, row)) for device, row in enumerate(rows)]
    _check_indices(what, found)
    if not any("R" in action.phase for row in found for action in row):
        found = [[_with_remat(action) for action in row] for row in found]
    every = [action for row in found for action in row]
    scheduled = Scheduled(
        name,
        1 + max(action.stage for action in every),
        1 + max(action.microbatch for action in every),
        tuple(map(tuple, found)),
    )
    try:
        scheduled.verify()
    except VerifyError as error:
        whole = all("W" not in action.phase for action in every)
        raise OptionError(
            f"{what}: {error.problem}",
            expected=error.expected,
            found=error.found,
            remedy='write "BW0.0" for a whole backward: "B0.0" leaves gradients of parameters to'
            ' "W0.0"'
            if whole and any("B" in action.phase for action in every)
            else None,
        ) from None
    _check_forwards(what, scheduled)
    return scheduled


def _actions(what: str, device: int, row: object) -> Iterator[Action]:
    """The entries of a device as actions."""
    if not isinstance(row, (list, tuple)):
        problem = f"{what}: device {device}"
        raise OptionError(problem, expected="a list of actions", found=shown(row))
    if not row:
        problem = f"{what}: device {device} runs nothing"
        raise OptionError(problem, expected="at least one action")
    for i, entry in enumerate(row):
        yield _action(f"{what}: entry {i} of device {device}", entry)


def _action(where: str, entry: object) -> Action:
    """One entry, its letters and numbers checked."""
    found: object = entry
    if isinstance(entry, str) and (match := _TEXT.fullmatch(entry.strip())):
        found = (match[1], int(match[2]), int(match[3]))
    elif isinstance(entry, Action):
        found = (entry.phase, entry.stage, entry.microbatch)
    if not isinstance(found, (list, tuple)) or len(found) != 3:
        expected = "an action, such as 'F0.1' or ('F', 0, 1): letters, stage, micro-batch"
        raise OptionError(where, expected=expected, found=shown(entry))
    letters, stage, microbatch = found
    if not isinstance(letters, str) or letters not in PHASES:
        expected = f"one of {', '.join(PHASES)}"
        raise OptionError(f"{where}: unknown letters", expected=expected, found=shown(entry))
    for number, of in ((stage, "stage"), (microbatch, "micro-batch")):
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            expected = "an integer >= 0"
            raise OptionError(f"{where}: {of}", expected=expected, found=shown(entry))
    return Action(letters, stage, microbatch)


def _check_indices(what: str, rows: Sequence[Sequence[Action]]) -> None:
    """Refuse an index that skips others, before anything is allocated for all up to it."""
    stages = {action.stage for row in rows for action in row}
    microbatches = {action.microbatch for row in rows for action in row}
    for indices, name in ((stages, "stage"), (microbatches, "micro-batch")):
        missing = next(i for i in range(len(indices) + 1) if i not in indices)
        if missing < len(indices):
            device, action = next(
                (device, action)
                for device, row in enumerate(rows)
                for action in row
                if (action.stage if name == "stage" else action.microbatch) > missing
            )
            raise OptionError(
                f"{what}: {action} on device {device}, but nothing runs {name} {missing}",
                expected=f"every {name} from 0 on",
            )


def _with_remat(action: Action) -> Action:
    """The same action, with R as the first part of a B."""
    phase = "R" + action.phase if "B" in action.phase else action.phase
    return Action(phase, action.stage, action.microbatch)


def _check_forwards(what: str, scheduled: Scheduled) -> None:
    """Each stage runs its forwards in the order of micro-batches, as generated code must."""
    turn = [0] * scheduled.stages
    for device, row in enumerate(scheduled.devices):
        for action in row:
            if action.phase == "F":
                if action.microbatch != turn[action.stage]:
                    raise OptionError(
                        f"{what}: {action} on device {device} is out of order: buffers pass from"
                        " one micro-batch to the next",
                        expected=f"F{action.stage}.{turn[action.stage]} before it",
                    )
                turn[action.stage] += 1
