"""What the parts of `benchmarks.gpu` share: the device, sizes, timing, and how failures end."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import autopipe
from autopipe.runtime.backends import backend_of
from benchmarks.models import gpt2

Step = Callable[[], None]
Batch = dict[str, Tensor]


@dataclass
class Setting:
    """Where and how large.

    Attributes:
        device: of all stages.
        tiny: sizes that show that a part works, and measure nothing.
        failed: what failed so far.
    """

    device: torch.device
    tiny: bool = False
    failed: list[str] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return 2 if self.tiny else 7

    @property
    def warm_up(self) -> int:
        return 1 if self.tiny else 3

    @property
    def name(self) -> str:
        """The device, and torch."""
        name = backend_of(self.device).name(self.device)
        return f"{name}, torch {torch.__version__}" + (", tiny sizes" if self.tiny else "")

    def gpt2(
        self, layers: int = 24, sequence: int = 1024
    ) -> tuple[nn.Module, Callable[[int], Batch]]:
        """GPT-2 with d 1024, 16 heads, weights in bfloat16; and its batches by batch size."""
        shape = (8, 32, 2, 16, 128) if self.tiny else (layers, 1024, 16, sequence, 50257)
        model, inputs = gpt2(*shape)
        model.to(self.device, torch.bfloat16)
        return model, lambda batch: {n: x.to(self.device) for n, x in inputs(batch).items()}

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Print what fails, and go on."""
        try:
            yield
        except Exception as error:
            self.failed.append(what)
            print(f"{what}: FAILED: {type(error).__name__}: {str(error)[:500]}", flush=True)
            print("    " + traceback.format_exc(limit=-3).strip().replace("\n", "\n    "))
        finally:
            self.free()

    def free(self) -> None:
        """Forget compiled code, and memory that nothing uses."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, step: Step) -> float:
        """The median step; the device has finished before and after."""
        for _ in range(self.warm_up):
            step()
        return statistics.median(self.once(step) for _ in range(self.rounds))

    def once(self, step: Step) -> float:
        backend = backend_of(self.device)
        backend.synchronize(self.device)
        start = time.perf_counter()
        step()
        backend.synchronize(self.device)
        return time.perf_counter() - start

    def peak(self, step: Step) -> float:
        """GiB allocated at most during one step, after a warm-up step; nan on a CPU."""
        step()
        gc.collect()
        if self.device.type != "cuda":
            step()
            return float("nan")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30

    def row(self, what: str, make: Callable[[], Step]) -> None:
        """Print a line about one kind of step: how long it takes, how much it allocates."""
        with self.guarded(what):
            start = time.perf_counter()
            step = make()
            self.once(step)
            first = time.perf_counter() - start
            seconds = self.seconds(step)
            print(
                f"{what:44} {1e3 * seconds:8.1f} ms   peak {self.peak(step):6.2f} GiB"
                f"   first step after {first:.0f} s",
                flush=True,
            )


def training(module: Callable[..., Any], model: nn.Module, batch: Batch) -> Step:
    """A training step without the optimizer."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        module(**batch).loss.backward()

    return step


def pipelined(
    setting: Setting, model: nn.Module, batch: Batch, stages: int, chunks: int, **options: Any
) -> autopipe.Pipeline:
    """The model in stages that are all on one device."""
    devices = [setting.device] * stages
    return autopipe.compile(model, devices, chunks, kwargs=batch, **options)
