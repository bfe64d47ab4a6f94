"""Plans under a memory limit that goes down: what is chosen, what it costs, what is really used.

    python -m benchmarks.limits                GPT-2, 24 layers, d 1024, on 4 devices (minutes)
    python -m benchmarks.limits plan           the plans alone
    python -m benchmarks.limits small          6 layers, d 256

`remat="auto"`, `chunks=None`. The model is GPT-2 medium's shape (vocabulary 50,257, its table tied
to the head), a batch of 8 × 128 tokens. Limits go from what the fastest plan takes to nothing that
fits. Each plan is run for a step with Adam's state in place: of each stage, parameters, optimizer
state and buffers are real tensors counted by their bytes, the rest is seen by `benchmarks.ledger`.
Bars: predicted step time rises as memory falls; measured memory is never above the limit; the
chosen rematerialization changes; the last one is an error that says what is missing and what to do.
"""

from __future__ import annotations

import gc
import sys
import time
from typing import Any

import torch

import autopipe
from autopipe.errors import MemoryLimitError
from benchmarks.ledger import watching
from benchmarks.models import gpt2

STEPS = (1.0, 0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.3)
"""Limits as fractions of the largest stage of the plan that no limit holds back."""


def planned(model: torch.nn.Module, call: dict[str, Any], limit: int | None) -> autopipe.Plan:
    return autopipe.plan(model, ["cpu"] * 4, kwargs=call, remat="auto", memory=limit)


def used(plan: autopipe.Plan, model: torch.nn.Module, call: dict[str, Any]) -> list[int]:
    """Bytes of each stage while a second step runs."""
    pipe = autopipe.compile(model, plan=plan, kwargs=call)
    optimizer = torch.optim.Adam(pipe.parameters())
    pipe(**call).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    with watching(model) as ledger:
        pipe(**call).loss.backward()
    static = []
    for stage in plan.stages:
        own = [model.get_parameter(name) for name in stage.parameters]
        state = [t for p in own for t in optimizer.state[p].values() if t.ndim]
        # Shared parameters count once: on one device, no stage has a copy of them.
        static.append(sum(t.nbytes for t in [*own, *state]))
    pipe.zero_grad()
    return [n + ledger.peak[k] for k, n in enumerate(static)]


def main() -> None:
    torch.set_num_threads(1)
    small, only = "small" in sys.argv, "plan" in sys.argv
    shape = (6, 256, 4, 64, 4096) if small else (24, 1024, 16, 128, 50257)
    if only:
        with torch.device("meta"):
            model, inputs = gpt2(*shape)
    else:
        model, inputs = gpt2(*shape)
    call = inputs(8)
    free = planned(model, call, None)
    most = max(s.memory_bytes for s in free.stages)
    last = 0.0
    for fraction in STEPS:
        limit = int(most * fraction)
        start = time.perf_counter()
        try:
            plan = planned(model, call, limit)
        except MemoryLimitError as error:
            print(f"{limit / 2**20:7.0f} MiB: {error}")
            break
        took = time.perf_counter() - start
        line = (
            f"{limit / 2**20:7.0f} MiB: step {plan.step_seconds:6.3f} s, M={len(plan.sizes)},"
            f" remat {', '.join(s.remat for s in plan.stages)};"
            f" planned {_mib(s.memory_bytes for s in plan.stages)} MiB"
        )
        line += " FASTER with less" if plan.step_seconds < last else ""
        last = plan.step_seconds
        if not only:
            measured = used(plan, model, call)
            line += f", used {_mib(measured)} MiB"
            line += f", at most {max(measured) / limit:.1%} of the limit"
        print(f"{line} (planned in {took:.0f} s)", flush=True)
        assert only or max(measured) <= limit, "above the limit"


def _mib(values: Any) -> str:
    return " ".join(f"{v / 2**20:.0f}" for v in values)


if __name__ == "__main__":
    main()
