"""Parts of `benchmarks.gpu`: step times and peak memory of GPT-2, plain and pipelined."""

from __future__ import annotations

import time
from typing import Any

import torch

import autopipe
from benchmarks.gpu_setting import Setting, Small, Step, pipelined, training

BATCH, CHUNKS, STAGES = 8, 8, 4
SCHEDULES = ("gpipe", "1f1b", "zb-h1")


def heading(setting: Setting) -> None:
    sizes = "2 layers, d 32" if setting.tiny else "24 layers, d 1024, 16 heads, sequence 1024"
    print(f"GPT-2, {sizes}, bfloat16 weights without autocast, batch {BATCH}, no optimizer")


def plain(setting: Setting) -> None:
    """Eager torch and `torch.compile`, for the whole batch at once."""
    heading(setting)
    model, inputs = setting.gpt2()
    batch = inputs(BATCH)
    setting.row("eager", lambda: training(model, model, batch))
    setting.row("torch.compile", lambda: training(torch.compile(model), model, batch))
    print("CUDA graphs: torch.compile alone; autopipe's inductor backend runs without them")

    def reduced() -> Step:
        step = training(torch.compile(model, mode="reduce-overhead"), model, batch)

        def marked() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            step()

        return marked

    setting.row("torch.compile, reduce-overhead", reduced)


def one_stage(setting: Setting) -> None:
    _steps(setting, "eager", [(1, 1, "gpipe"), (1, CHUNKS, "gpipe")])


def four_stages(setting: Setting) -> None:
    _steps(setting, "eager", [(STAGES, CHUNKS, kind) for kind in SCHEDULES])


def inductor_one_stage(setting: Setting) -> None:
    _steps(setting, "inductor", [(1, 1, "gpipe"), (1, CHUNKS, "gpipe")])


def inductor_four_stages(setting: Setting) -> None:
    _steps(setting, "inductor", [(STAGES, CHUNKS, kind) for kind in SCHEDULES])


def _steps(setting: Setting, backend: Any, cases: list[tuple[int, int, str]]) -> None:
    heading(setting)
    model, inputs = setting.gpt2()
    batch = inputs(BATCH)
    for stages, chunks, kind in cases:
        what = f"autopipe {backend}, {stages} stages, M={chunks}, {kind}"

        def make(stages: int = stages, chunks: int = chunks, kind: str = kind) -> Step:
            pipe = pipelined(
                setting, model, batch, stages, chunks, schedule=kind, remat="none", backend=backend
            )
            return training(pipe, model, batch)

        setting.row(what, make)


def actions(setting: Setting) -> None:
    """What an action costs the host: stages of a tiny layer each, beside the same layers plain."""
    chunks = 4 if setting.tiny else 64
    x = torch.randn(2 * chunks, 8, device=setting.device)
    model = Small().to(setting.device)

    def accumulate() -> None:
        for part in x.split(2):
            (model(part) / chunks).backward()

    def host(step: Step) -> float:
        """Seconds until the step has been queued."""
        for _ in range(setting.warm_up):
            step()
        found = []
        for _ in range(setting.rounds):
            start = time.perf_counter()
            step()
            found.append(time.perf_counter() - start)
        return sorted(found)[len(found) // 2]

    whole = host(accumulate)
    print(f"plain: {1e6 * whole / chunks:.0f} µs a micro-batch (forward and backward)")
    for stages, kind in [(1, "gpipe"), *((STAGES, kind) for kind in SCHEDULES)]:
        with setting.guarded(f"{stages} stages, {kind}"):
            pipe = autopipe.compile(
                model, [setting.device] * stages, chunks, remat="none", schedule=kind, args=(x,)
            )
            taken = host(lambda pipe=pipe: pipe(x).backward())  # type: ignore[misc]
            count = sum(map(len, pipe.scheduled.devices))
            print(
                f"{stages} stages, {kind}: {1e6 * taken / chunks:.0f} µs a micro-batch,"
                f" {1e6 * taken / count:.0f} µs an action, of which"
                f" {1e6 * (taken - whole) / count:+.0f} µs more than plain",
                flush=True,
            )
