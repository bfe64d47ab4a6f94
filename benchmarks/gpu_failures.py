"""Part of `benchmarks.gpu`: what a user reads when a kernel fails, or when no memory is left.

    python -m benchmarks.gpu_failures --device cuda:0    one step with an index out of range

An error of a kernel makes the GPU useless for its process, so that step runs in one of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import StageError
from benchmarks.gpu_device import CARDS, Card, failing_receive
from benchmarks.gpu_setting import Setting

WORDS, SECONDS = 16, 60
TEXT = "CUDA error: device-side assert triggered"
VARIABLE = "CUDA_LAUNCH_BLOCKING"


class Lookup(nn.Module):
    """An embedding, which fails on an index out of range, and layers."""

    def __init__(self, width: int = 64, count: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean((1, 2))


class Wide(nn.Module):
    """Layers that save much."""

    def __init__(self, width: int, count: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)).sin().cos()
        return x.square().mean(1)


def failing_step(card: Card) -> Exception:
    """Call until the device reports the error; where none comes late, as if one did.

    Returns:
        What a call of the pipeline raised.

    Raises:
        AssertionError: no error came.
    """
    model = Lookup()
    card.place(model)
    pipe = autopipe.compile(model, [card.device] * 2, 2)
    ids = torch.randint(0, WORDS, (8, 4))
    pipe(card.put(ids)).sum().backward()
    card.synchronize()
    bad = ids.clone()
    bad[5, 2] = WORDS + 1
    wrong = card.put(bad if card.is_gpu else ids)
    late = nullcontext() if card.is_gpu else failing_receive(torch.AcceleratorError(TEXT))
    end = time.monotonic() + SECONDS / 4
    while time.monotonic() < end:  # any later call may be told, also one of the caller's own
        try:
            with late:
                pipe(wrong)
        except (StageError, torch.AcceleratorError) as error:
            return error
    raise AssertionError("no error came")


def faults_of_assert(text: str, *, blocking: bool, is_gpu: bool) -> list[str]:
    """What an error of a kernel fails to say.

    Args:
        text: what the process printed.
        blocking: launches were blocking, so that the op is known.
        is_gpu: there is a variable that names the op.
    """
    wanted = {
        "a StageError": r"^StageError: ",
        "the step": r"StageError: (stage \d+, micro-batch \d+|the (forward|backward|step)) failed",
        "that a kernel failed": r"device-side assert|CUDA error",
        "that an earlier kernel may have failed": r"may be one of any\s+stage, or one before",
        "that the process has to be restarted": r"restart the process",
    }
    if is_gpu:
        wanted["the variable that names the op"] = f"{VARIABLE}=1"
    if is_gpu and blocking:
        wanted["stage 0, where the embedding is"] = r"StageError: stage 0, micro-batch \d+ failed"
        wanted["the op"] = r"node: .*embedding"
    found = [what for what, pattern in wanted.items() if not re.search(pattern, text, re.M)]
    found += ["that the pipeline cannot be called again"] * ("can be called again" in text)
    return [f"does not say: {what}" for what in found]


def kernel_fails(setting: Setting) -> None:
    """An index out of range in an embedding, with launches that block and without."""
    device = str(setting.device) if setting.card.is_gpu else "cpu"
    command = [sys.executable, "-m", "benchmarks.gpu_failures", "--device", device]
    for blocking in (False, True):
        what = "an index out of range" + (f", {VARIABLE}=1" if blocking else "")
        with setting.guarded(what):
            environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
            if blocking:
                environment[VARIABLE] = "1"
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=2 * SECONDS
            )
            text = done.stdout + done.stderr[-4000:]
            print("    " + text.strip().replace("\n", "\n    "))
            is_gpu = setting.card.is_gpu
            setting.check(what, faults_of_assert(text, blocking=blocking, is_gpu=is_gpu))


def faults_of_memory(error: StageError, stages: int) -> list[str]:
    """What an error of a device without free memory fails to say."""
    found = []
    if error.stage not in range(stages):
        found.append("the stage")
    if "planned for stage" not in str(error.expected):
        found.append("what its plan says")
    if not isinstance(error.__cause__, torch.OutOfMemoryError):
        found.append("torch's error, as its cause")
    for text in ("memory=", "remat", "can be called again"):
        if text not in str(error.remedy):
            found.append(text)
    return [f"does not say: {what}" for what in found]


def no_memory(setting: Setting) -> None:
    """Too little memory, in the forward or the backward; then the same step with enough."""
    card, what = setting.card, "out of memory"
    width, batch = (8, 8) if setting.tiny else (4096, 8192)
    with setting.guarded(what):
        torch.manual_seed(0)
        model = Wide(width)
        card.place(model)
        pipe = autopipe.compile(model, [setting.device] * 2, 2, remat="none")
        x = card.put(torch.randn(batch, width))

        def step() -> Tensor:
            model.zero_grad(set_to_none=True)
            loss = pipe(x).sum()
            loss.backward()
            return card.values(loss)

        before = step()
        with card.short_of_memory():
            try:
                step()
            except StageError as error:
                print("    " + str(error).replace("\n", "\n    "))
                setting.check(what, faults_of_memory(error, 2))
            else:
                setting.check(what, ["no error came"])
        again = [] if torch.equal(step(), before) else ["another result than before"]
        setting.check("the same step with enough memory", again)


def failures(setting: Setting) -> None:
    kernel_fails(setting)
    no_memory(setting)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_failures")
    parser.add_argument("--device", type=torch.device, required=True)
    where = parser.parse_args().device
    found = failing_step(CARDS[where.type](where))
    print(f"{type(found).__name__}: {found}", flush=True)
    os._exit(0)  # what is left on such a GPU cannot be freed
