"""Parts of `benchmarks.gpu` about many steps: what grows, and how fast one process issues calls."""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time
from typing import NamedTuple

import torch
from torch import nn

import autopipe
from autopipe.passes.devices import H100
from benchmarks.gpu_device import Card
from benchmarks.gpu_kernels import Calls
from benchmarks.gpu_setting import Setting, Small, Step
from benchmarks.models import ResNet

STEPS, EARLY, TEN = 50, 5, 10


class Held(NamedTuple):
    """What a process holds: bytes of the device, threads, open files."""

    allocated: int
    reserved: int
    threads: int
    files: int

    @classmethod
    def now(cls, card: Card) -> Held:
        gc.collect()
        card.synchronize()
        threads = threading.active_count()
        if os.path.isdir("/proc/self/task"):
            threads = len(os.listdir("/proc/self/task"))
        files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        return cls(card.allocated(), card.reserved(), threads, files)

    def __str__(self) -> str:
        memory = (
            f"allocated {self.allocated / 2**20:.2f} MiB, reserved {self.reserved / 2**20:.0f} MiB"
        )
        return f"{memory}, {self.threads} threads, {self.files} files"


def growth(early: Held, late: Held, first: float, last: float) -> list[str]:
    """What grew between step 5 and step 50.

    Args:
        early, late: what was held after these steps.
        first, last: the median step of the ten after step 5, and of the last ten.
    """
    faults = []
    if late.allocated > early.allocated + 2**20:
        faults.append(f"allocated memory grew by {(late.allocated - early.allocated) >> 10} KiB")
    if late.reserved > 1.05 * early.reserved + 2**26:
        faults.append(f"reserved memory grew by {(late.reserved - early.reserved) >> 20} MiB")
    if late.threads > early.threads:
        faults.append(f"{late.threads - early.threads} more threads")
    if late.files > early.files:
        faults.append(f"{late.files - early.files} more open files")
    if last > 1.2 * first:
        faults.append(f"steps became slower: {1e3 * first:.1f} ms, then {1e3 * last:.1f} ms")
    return faults


def leaks(setting: Setting) -> None:
    """50 training steps with SGD of a ResNet and a bf16 GPT-2, one stage and two."""
    card = setting.card

    def resnet() -> tuple[nn.Module, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        size, classes = (32, 10) if setting.tiny else (128, 1000)
        model = ResNet((1, 1), 4, classes) if setting.tiny else ResNet()
        images = torch.randn(8, 3, size, size)
        labels = torch.randint(0, classes, (8,))
        card.place(model)
        return model, {"images": card.put(images), "labels": card.put(labels)}

    def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
        model, inputs = setting.gpt2(layers=8, sequence=512)
        return model, inputs(8)

    for name, make in (("ResNet-50", resnet), ("GPT-2, 8 layers, bf16", gpt2)):
        for stages in (1, 2):
            what = f"{name}, {stages} stages"
            with setting.guarded(what):
                model, batch = make()
                pipe = autopipe.compile(model, [setting.device] * stages, 4, kwargs=batch)
                optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

                def step(
                    pipe: autopipe.Pipeline = pipe,
                    batch: dict[str, torch.Tensor] = batch,
                    optimizer: torch.optim.Optimizer = optimizer,
                ) -> None:
                    optimizer.zero_grad(set_to_none=True)
                    found = pipe(**batch)
                    getattr(found, "loss", found).backward()
                    optimizer.step()

                setting.check(what, grown(setting, step))


def grown(setting: Setting, step: Step) -> list[str]:
    """Run the steps, print what is held, and return what grew."""
    count = 2 * EARLY if setting.tiny else STEPS
    times, early = [], None
    for number in range(1, count + 1):
        times.append(setting.once(step))
        if number == EARLY:
            early = Held.now(setting.card)
    assert early is not None
    late = Held.now(setting.card)
    first = statistics.median(times[EARLY : EARLY + TEN])
    last = statistics.median(times[-TEN:])
    print(f"    after step {EARLY}: {early}, step {1e3 * first:.1f} ms")
    print(f"    after step {count}: {late}, step {1e3 * last:.1f} ms", flush=True)
    if not setting.card.is_gpu:  # other programs use the processor, too
        last = min(first, last)
    return growth(early, late, first, last)


def calls(setting: Setting) -> None:
    """Operator calls that one process issues a second, with tiny tensors and 1, 2, 4 stages."""
    chunks = 4 if setting.tiny else 16
    x = torch.randn(2 * chunks, 8)
    model = Small(32)
    setting.card.place(model)
    x = setting.card.put(x)

    def accumulate() -> None:
        for part in x.chunk(chunks):
            (model(part) / chunks).backward()

    print(f"the plan's figure: {1e6 * H100.call_seconds:.1f} µs a call, from any thread")
    with setting.guarded("calls, plain"):
        _rate(setting, "plain", accumulate)
    for stages in (1, 2, 4):
        with setting.guarded(f"calls, {stages} stages"):
            pipe = autopipe.compile(
                model, [setting.device] * stages, chunks, remat="none", args=(x,)
            )
            _rate(setting, f"{stages} stages", lambda pipe=pipe: pipe(x).backward())  # type: ignore[misc]


def _rate(setting: Setting, what: str, step: Step) -> None:
    queued, whole = [], []
    for _ in range(setting.warm_up):
        step()
    with Calls() as seen:
        step()
    for _ in range(2 * setting.rounds):
        setting.card.synchronize()
        start = time.perf_counter()
        step()
        queued.append(time.perf_counter() - start)
        setting.card.synchronize()
        whole.append(time.perf_counter() - start)
    count = len(seen.operators)
    each, ended = (statistics.median(times) / count for times in (queued, whole))
    print(
        f"{what:10} {count} calls a step, {1 / each:9,.0f} a second, {1e6 * each:.2f} µs each"
        f" until queued, {1e6 * ended:.2f} µs until done; {beside_the_plan(each)}",
        flush=True,
    )


def beside_the_plan(seconds: float, planned: float = H100.call_seconds) -> str:
    """A measured call beside the planned one: good, or what to change in `passes/devices.py`."""
    if 0.67 <= seconds / planned <= 1.5:
        return "the plan's figure holds"
    return f"the plan's figure is off by a factor {seconds / planned:.2f}"
