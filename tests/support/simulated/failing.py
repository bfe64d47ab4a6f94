"""A step that fails in the middle, after which the caller goes on at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import autopipe
from autopipe.errors import StageError
from autopipe.runtime.executor import Run

from .machine import Machine
from .pairs import BATCH, WIDTH, callers_streams, placed


def fail_and_go_on(
    machine: Machine,
    pipe: autopipe.Pipeline,
    place: str,
    direction: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two failed steps, after each of which the caller overwrites everything; then a right one.

    Args:
        machine: the devices.
        pipe: of one of `NETS`, with at least two stages.
        place: where the caller's tensors are.
        direction: in which stage 1 fails: "forward" or "backward".
        monkeypatch: of the test.
    """
    receive = Run.receive

    def failing(self: Run, value: str, stage: int, m: int) -> Tensor:
        tensor = receive(self, value, stage, m)
        if stage == 1 and m == 2 and value.startswith("grad") == (direction == "backward"):
            raise RuntimeError("as asked")
        return tensor

    with callers_streams(machine, "side"):
        inputs = [placed(machine, torch.ones(BATCH, WIDTH), place) for _ in range(2)]
        pipe(*inputs).sum().backward()  # the parameters are placed
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(Run, "receive", failing)
                with pytest.raises(StageError, match="as asked"):
                    pipe(*inputs).sum().backward()
            with torch.no_grad():
                for tensor in (*inputs, *pipe.parameters()):
                    tensor.mul_(1.0)
        pipe(*inputs).sum().backward()
