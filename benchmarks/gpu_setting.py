"""What the parts of `benchmarks.gpu` share: the device, sizes, timing, and how failures end."""

from __future__ import annotations

import gc
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import OptionError
from benchmarks.gpu_device import CARDS, Card
from benchmarks.models import gpt2

Step = Callable[[], None]
Batch = dict[str, Tensor]


@dataclass
class Setting:
    """Where and how large.

    Attributes:
        device: of all stages.
        tiny: sizes that show that a part works, and measure nothing.
        folder: for files.
        failed: what failed so far.
        refused: what autopipe refused, as options that it does not have here.
        end: `time.monotonic` at which the process ends by force; None: never.
    """

    device: torch.device
    tiny: bool = False
    folder: Path = Path("gpu_results")
    failed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    end: float | None = None

    @cached_property
    def card(self) -> Card:
        """What can be asked of the device."""
        return CARDS[self.device.type](self.device)

    @property
    def rounds(self) -> int:
        return 2 if self.tiny else 7

    @property
    def warm_up(self) -> int:
        return 1 if self.tiny else 3

    @property
    def name(self) -> str:
        """The device, and torch."""
        name = self.card.backend.name(self.device)
        python = platform.python_version()
        return f"{name}, Python {python}, torch {torch.__version__}" + (
            ", tiny sizes" if self.tiny else ""
        )

    def gpt2(
        self, layers: int = 24, sequence: int = 1024, tiny: int = 2
    ) -> tuple[nn.Module, Callable[[int], Batch]]:
        """GPT-2 with d 1024, 16 heads, weights in bfloat16; and its batches by batch size.

        Args:
            layers, sequence: its size.
            tiny: how many layers it has where sizes are tiny.
        """
        shape = (tiny, 32, 2, 16, 128) if self.tiny else (layers, 1024, 16, sequence, 50257)
        model, inputs = gpt2(*shape)
        self.card.place(model.to(torch.bfloat16))
        return model, lambda batch: {n: self.card.put(x) for n, x in inputs(batch).items()}

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Print what fails, and go on."""
        try:
            yield
        except OptionError as error:
            self.refused.append(what)
            print(f"{what}: refused: {error}", flush=True)
        except Exception as error:
            self.failed.append(what)
            print(f"{what}: FAILED: {type(error).__name__}: {str(error)[:800]}", flush=True)
            lines = traceback.format_exc(limit=-6).strip().splitlines()
            print("    " + "\n    ".join(lines[-60:]), flush=True)
        finally:
            self.free()

    def check(self, what: str, faults: Sequence[str]) -> None:
        """Print what a check has found; it is a failure if that is anything."""
        print(f"{what}: {'; '.join(faults) or 'ok'}", flush=True)
        if faults:
            self.failed.append(what)

    def free(self) -> None:
        """Forget compiled code, and memory that nothing uses."""
        torch._dynamo.reset()
        gc.collect()
        try:
            self.card.empty_cache()
        except RuntimeError as error:  # a GPU after an error of a kernel
            print(f"cannot free memory: {str(error).splitlines()[0]}", flush=True)

    def seconds(self, step: Step) -> float:
        """The median step; the device has finished before and after."""
        for _ in range(self.warm_up):
            step()
        return statistics.median(self.once(step) for _ in range(self.rounds))

    def once(self, step: Step) -> float:
        self.card.synchronize()
        start = time.perf_counter()
        step()
        self.card.synchronize()
        return time.perf_counter() - start

    def peak(self, step: Step) -> float:
        """GiB allocated at most during one step, after a warm-up step; nan on a CPU."""
        step()
        gc.collect()
        return self.card.peak(step) / 2**30

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


class Small(nn.Module):
    """Layers that take no time, so that what is measured is how they are called."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


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
