"""Two processes of torch.distributed.pipelining that stay alive, with a stage each.

Each is pinned to a core, and sleeps in a blocking read while nothing is asked of it.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.rounds import gradients, pin
from benchmarks.step_cases import Case

WORLD = 2


class Rank:
    """What one process does; each method answers a message of `GlooStages`."""

    def __init__(self, rank: int, case: Case) -> None:
        self.rank, self.case = rank, case
        self.schedules: dict[str, Any] = {}
        self.parts: dict[str, torch.nn.Sequential] = {}

    def prepare(self, name: str, kind: str, chunks: int, split: int) -> None:
        """Make a schedule, by the name of its class; the first stage has `split` layers."""
        from torch.distributed.pipelining import PipelineStage, schedules

        layers = list(self.case.layers)
        part = torch.nn.Sequential(*(layers[:split] if self.rank == 0 else layers[split:]))
        stage = PipelineStage(part, self.rank, WORLD, torch.device("cpu"))
        self.parts[name] = part
        self.schedules[name] = getattr(schedules, kind)(stage, chunks, loss_fn=self.case.loss)

    def step(self, name: str) -> tuple[float, float]:
        """Run one training step; its start and end on the clock that all processes share."""
        self.case.model.zero_grad(set_to_none=True)
        torch.distributed.barrier()
        start = time.perf_counter()
        if self.rank == 0:
            self.schedules[name].step(self.case.x)
        else:
            self.schedules[name].step(target=self.case.target)
        return start, time.perf_counter()

    def gradients(self, name: str) -> list[Any]:
        """Of the stage's parameters, in order."""
        return [g.numpy() for g in gradients(self.parts[name].parameters())]


def _serve(
    messages: Connection, build: Callable[[], Case], rank: int, core: int, store: str
) -> None:
    pin({core})
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD
    )
    worker = Rank(rank, build())
    while True:
        method, *args = messages.recv()
        try:
            messages.send(("done", getattr(worker, method)(*args)))
        except Exception as error:  # the other process may wait for this one for ever
            messages.send(("error", f"rank {rank}: {type(error).__name__}: {error}"))


class GlooStages:
    """The two processes.

    Args:
        build: makes the same case in every process.
        cores: of each.
    """

    def __init__(self, build: Callable[[], Case], cores: Sequence[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, build, rank, cores[rank], store), daemon=True
            )
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def _ask(self, *message: Any) -> list[Any]:
        for end in self._ends:
            end.send(message)
        answers = []
        for end in self._ends:
            kind, answer = end.recv()
            if kind == "error":
                raise RuntimeError(answer)
            answers.append(answer)
        return answers

    def prepare(self, name: str, kind: str, chunks: int, split: int) -> None:
        """Make a schedule in both processes; see `Rank.prepare`."""
        self._ask("prepare", name, kind, chunks, split)

    def step(self, name: str) -> float:
        """Seconds of a step, from the first process that starts to the last that ends."""
        starts, ends = zip(*self._ask("step", name), strict=True)
        return float(max(ends) - min(starts))

    def gradients(self, name: str) -> list[Tensor]:
        """Of all parameters, after a step, in the order of the case's layers."""
        return [torch.from_numpy(g) for part in self._ask("gradients", name) for g in part]

    def close(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.terminate()
            process.join()
        self._folder.cleanup()
