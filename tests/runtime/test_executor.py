"""`Run`: hand-written programs in the words of generated ones.

Covers runtime/program.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autopipe.errors import StageError
from autopipe.runtime.executor import Run
from autopipe.runtime.memory import SavedBytesCounter
from autopipe.runtime.program import Program
from autopipe.runtime.transfer import WorkerDevice

CPU = torch.device("cpu")
SIZES = (2, 2, 1)


def run_of(
    forward: tuple[Callable[[Run], None], ...],
    backward: tuple[Callable[[Run], None], ...] = (),
    **more: Any,
) -> Run:
    count = len(forward)
    workers = tuple(WorkerDevice(CPU) for _ in range(count))
    program = Program(
        forward=forward,
        backward=backward,
        step=(),
        drivers=workers,
        workers=workers,
        sizes=SIZES,
        draws=more.get("draws", {n: [[]] * count for n in SIZES}),
        strides=more.get("strides", {}),
        filename="<none>",
        symbols=more.get("symbols", dict.fromkeys(SIZES, ())),
        queues=defaultdict(lambda: 2),
    )
    state = more.get("state", [[torch.tensor(2.0)]] * count)
    return Run(program, state, more.get("buffers", {}), 7, SavedBytesCounter(range(count)))


def feed(run: Run) -> list[torch.Tensor]:
    parts = [torch.randn(n, 3) for n in SIZES]
    for m, part in enumerate(parts):
        run.feed("x", 0, m, part)
    return parts


def first(run: Run) -> None:
    for m in range(3):
        x = run.receive("x", 0, m)
        (weight,) = run.state(0)
        run.save(0, m, [x])
        run.send("y", 0, 1, m, x * weight)


def last(run: Run) -> None:
    for m in range(3):
        run.return_to_caller("z", m, run.receive("y", 1, m) + 1)


def last_backward(run: Run) -> None:
    for m in range(3):
        run.send("grad y", 1, 0, m, run.receive("grad z", 1, m))


def first_backward(run: Run) -> None:
    for m in range(3):
        ctx = run.context(0, m, ["weight"])
        (x,) = run.pop_saved(0, m)
        ctx.accumulate(0, (run.receive("grad y", 0, m) * x).sum())


def test_forward_and_backward_of_two_stages() -> None:
    run = run_of((first, last), (first_backward, last_backward))
    parts = feed(run)
    run.execute("forward")
    for m, part in enumerate(parts):
        assert torch.equal(run.results["z", m], part * 2 + 1)
    assert run.memory.stages[0].now == 5 * 3 * 4
    for m, part in enumerate(parts):
        run.feed("grad z", 1, m, torch.ones_like(part))
    run.execute("backward")
    sums = [part.sum() for part in parts]
    (total,) = run.gradients.totals({"weight": CPU})
    assert torch.equal(total, sums[0] + sums[1] + sums[2])
    assert run.memory.stages[0].now == 0


def test_the_callers_tensors_get_the_traced_strides() -> None:
    seen: list[tuple[int, ...]] = []

    def forward(run: Run) -> None:
        seen.extend(run.receive("x", 0, m).stride() for m in range(3))

    run = run_of((forward,), strides={("x", 0, 2): (1, 2)})
    feed(run)
    run.execute("forward")
    assert seen == [(1, 2), (1, 2), (3, 1)]


def test_gradients_are_summed_without_changing_the_first() -> None:
    run = run_of((first, last))
    parts = [torch.full((2,), float(m + 1)) for m in range(3)]
    for part in parts:
        run.accumulate("p", 0, part)
    assert torch.equal(*run.gradients, torch.full((2,), 6.0))
    assert torch.equal(parts[0], torch.ones(2))


def test_buffers_are_written_in_place() -> None:
    buffer = torch.zeros(2)
    run = run_of((first, last), buffers={"mean": buffer})
    run.update_buffer("mean", 0, torch.ones(2))
    assert torch.equal(buffer, torch.ones(2))


def test_a_failure_drops_everything() -> None:
    def fails(run: Run) -> None:
        run.receive("y", 1, 0)
        raise ArithmeticError("no")

    run = run_of((first, fails))
    feed(run)
    with pytest.raises(StageError, match="ArithmeticError: no"):
        run.execute("forward")
    assert run.memory.stages[0].now == 0
    assert (run.inputs, run.results, [*run.gradients]) == ({}, {}, [])


def test_a_program_is_random_if_some_stage_draws() -> None:
    assert not run_of((first, last)).program.is_random
    draws = {n: [[], [(3, 0, False)]] for n in SIZES}
    assert run_of((first, last), draws=draws).program.is_random
