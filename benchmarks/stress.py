"""Threads, interrupts and leaks: many steps beside other threads, many Ctrl-C, many compiles.

    python -m benchmarks.stress
    python -m benchmarks.stress --steps 10000 --interrupts 1000 --compiles 200

Prints a table of figures. The exit code is 1 if a step was wrong, a thread raised, an interrupt
left something behind, or compiles leave tensors or modules.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autopipe
from autopipe.errors import StageError
from benchmarks.stress_models import BATCH, KINDS, Custom, Scaled, batch, mlp
from tests.support.process_state import differences, process_state

# ----------------------------------------------------------------------------------- threads


class Others:
    """Threads that compile, and that train eagerly, until they are stopped."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.compiles = self.trained = self.logged = 0
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._loop, args=(work,))
            for work in (self._compile, self._train)
        ]
        self._records: list[logging.LogRecord] = []
        self._logger = logging.getLogger("torch.stress")  # torch's own loggers are silenced
        self._logger.propagate = False
        handler = logging.Handler()
        handler.emit = self._records.append  # type: ignore[method-assign]
        self._logger.handlers = [handler]

    def __enter__(self) -> Others:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if len(self._records) != self.logged:
            self.errors.append(AssertionError(f"{len(self._records)} of {self.logged} logs came"))

    def _loop(self, work: Callable[[], None]) -> None:
        try:
            while not self._stop.is_set():
                start = time.perf_counter()
                work()  # and then leave Python to the others for as long
                self._stop.wait(time.perf_counter() - start)
        except BaseException as error:
            self.errors.append(error)

    def _compile(self) -> None:
        pipe = autopipe.compile(mlp(), devices=2, chunks=2)
        pipe(batch()).backward()
        self.compiles += 1

    def _train(self) -> None:
        model, x = Custom(), batch()
        assert 0 <= random.random() < 1
        self._logger.warning("step %s", self.trained)
        self.logged += 1
        warnings.warn("a warning of an eager thread", stacklevel=1)
        hooks: list[Tensor] = []
        h = checkpoint(model.first, x, use_reentrant=False)
        h.register_hook(hooks.append)
        loss = model.last(Scaled.apply(h, model.settings)).square().mean()
        loss.backward()
        assert len(hooks) == 1
        assert len(x) == BATCH
        (found,) = torch.autograd.grad(model(x), [model.first.weight])
        torch.testing.assert_close(found, model.first.weight.grad, rtol=1e-5, atol=1e-6)
        self.trained += 1


@contextmanager
def often_switched() -> Iterator[None]:
    """Let Python's threads take turns every 0.1 ms (as a rule 5): more orders, and less waiting."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def steps_beside_threads(steps: int) -> tuple[dict[str, object], bool]:
    """Train a pipeline in the main thread; every loss must be eager's."""
    model = mlp().double()
    pipe = autopipe.compile(model, devices=2, chunks=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    wrong, start = 0, time.perf_counter()
    with warnings.catch_warnings(), often_switched():
        warnings.simplefilter("ignore")
        with Others() as others:
            for _ in range(steps):
                x = batch().double()
                with torch.no_grad():
                    eager = model(x)
                loss = pipe(x)
                loss.backward()
                wrong += not torch.allclose(loss.detach(), eager, rtol=1e-12, atol=0)
                optimizer.step()
                optimizer.zero_grad()
    for error in others.errors:
        print(f"thread: {type(error).__name__}: {error}", file=sys.stderr)
    figures = {
        "steps beside two threads": steps,
        "steps with a wrong loss": wrong,
        "compiles in the second thread": others.compiles,
        "eager steps in the third": others.trained,
        "errors in threads": len(others.errors),
        "seconds of steps": round(time.perf_counter() - start, 1),
    }
    return figures, not wrong and not others.errors


# -------------------------------------------------------------------------------- interrupts


def interrupt(work: Callable[[], object], after: float, by_thread: bool) -> bool:
    """Send a SIGINT after some seconds, by an alarm or from another thread; did it come through?"""
    main, timer = threading.main_thread().ident, None
    assert main is not None
    try:
        if by_thread:
            timer = threading.Timer(after, lambda: signal.pthread_kill(main, signal.SIGINT))
            timer.start()
        else:
            signal.setitimer(signal.ITIMER_REAL, after)
        work()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if timer is not None:
            timer.cancel()
            timer.join()
    except KeyboardInterrupt:
        if timer is not None:
            timer.join()
        return True
    return False


def right_step(pipe: nn.Module, x: Tensor) -> list[Tensor]:
    pipe.zero_grad()
    loss = pipe(x)
    loss.backward()
    return [loss.detach(), *(p.grad for p in pipe.parameters() if p.grad is not None)]


def interrupts(count: int) -> tuple[dict[str, object], bool]:
    """Interrupt captures, steps and backwards at random instants."""
    for s in (signal.SIGINT, signal.SIGALRM):
        signal.signal(s, signal.default_int_handler)
    make, instants = partial(autopipe.compile, devices=2, chunks=2), random.Random(0)
    model, x = mlp(), batch()
    ready = make(model)
    expected = right_step(ready, x)
    seconds = {"capture": 0.2, "step": 0.004, "backward": 0.004}
    came, wrong, left = dict.fromkeys(seconds, 0), 0, set[str]()
    for i in range(count):
        place = list(seconds)[i % 3]
        pipe = make(model) if place == "capture" else ready
        work = pipe(x).backward if place == "backward" else partial(pipe, x)
        before = process_state()
        came[place] += interrupt(work, max(1e-6, instants.random() * seconds[place]), i % 2 == 1)
        left.update(differences(before, process_state()))
        found = right_step(pipe, x)
        wrong += not all(map(torch.equal, found, expected))
    for text in left:
        print(f"left behind: {text}", file=sys.stderr)
    figures: dict[str, object] = {f"interrupts in {p}": n for p, n in came.items()}
    figures |= {"wrong steps after interrupts": wrong, "settings left behind": len(left)}
    return figures, not wrong and not left


# ------------------------------------------------------------------------------------- leaks


def alive(kind: type) -> int:
    gc.collect()
    return sum(issubclass(type(x), kind) for x in gc.get_objects())


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def compiles(count: int, kind: str) -> tuple[dict[str, object], bool]:
    """Compile, train a step and drop; count what is left."""

    def once() -> None:
        model, step = KINDS[kind]()
        step(autopipe.compile(model, devices=2, chunks=2)).backward()

    for _ in range(3):
        once()
    before, start = (alive(Tensor), alive(nn.Module)), resident()
    for i in range(count):
        if i == count // 2:  # allocators are warm
            gc.collect()
            start = resident()
        once()
    gc.collect()
    growth = (resident() - start) / (count - count // 2) / 1024
    left = alive(Tensor) - before[0], alive(nn.Module) - before[1]
    text = f"{left[0]} tensors, {left[1]} modules, {growth:+.1f} KiB a compile of the later half"
    return {f"{count} compiles, {kind}": text}, left == (0, 0)


def failures(count: int) -> tuple[dict[str, object], bool]:
    """Steps that fail, and losses that are kept: neither keeps its batch."""
    pipe = autopipe.compile(nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8)), devices=2, chunks=2)
    losses, kept = [], 0
    for i in range(count):
        ids = torch.tensor([0, 1, 2, 99 if i % 2 else 3])
        try:
            losses.append(pipe(ids).sum())
            losses[-1].backward()
        except StageError:
            pass
        ref = weakref.ref(ids)
        del ids
        kept += ref() is not None
    return {f"of {count} steps, half of which fail, batches kept": kept}, not kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="0: leave these out")
    parser.add_argument("--interrupts", type=int, default=60)
    parser.add_argument("--compiles", type=int, default=10)
    sizes = parser.parse_args()
    parts: list[Callable[[], tuple[dict[str, object], bool]]] = [partial(failures, 100)]
    if sizes.steps:
        parts.append(partial(steps_beside_threads, sizes.steps))
    if sizes.interrupts:
        parts.append(partial(interrupts, sizes.interrupts))
    if sizes.compiles:
        parts += [partial(compiles, sizes.compiles, kind) for kind in KINDS]
    right = True
    for part in parts:
        figures, good = part()
        right = right and good
        for name, figure in figures.items():
            print(f"{name:52} {figure}", flush=True)
    sys.exit(not right)


if __name__ == "__main__":
    main()
