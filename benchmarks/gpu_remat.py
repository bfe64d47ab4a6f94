"""Parts of `benchmarks.gpu`: time and memory by rematerialization, and a trace."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import autopipe
from benchmarks.gpu_setting import Setting, Step, pipelined, training

BACKENDS = ("eager", "cudagraphs")
REMATS = ("none", "min-cut", "full", "offload")
BATCH, CHUNKS = 8, 8


def remat(setting: Setting) -> None:
    """Step time and peak memory, beside plain gradient accumulation."""
    sizes = "2 layers, d 32" if setting.tiny else "12 layers, d 1024, 16 heads, sequence 1024"
    print(f"GPT-2, {sizes}, bfloat16 weights, batch {BATCH}, M={CHUNKS}, no optimizer")
    model, inputs = setting.gpt2(layers=12)
    batch = inputs(BATCH)

    def accumulate() -> None:
        model.zero_grad(set_to_none=True)
        for chunk in range(CHUNKS):
            part = {name: x[chunk : chunk + 1] for name, x in batch.items()}
            (model(**part).loss / CHUNKS).backward()

    setting.row("plain, micro-batches one after the other", lambda: accumulate)
    for backend in BACKENDS:
        for stages in (1, 4):
            for policy in REMATS:
                if (backend, policy) == ("cudagraphs", "offload"):  # such stages run without graphs
                    continue
                pipes: list[autopipe.Pipeline] = []

                def make(
                    stages: int = stages,
                    pipes: list[autopipe.Pipeline] = pipes,
                    **options: Any,
                ) -> Step:
                    pipes.append(pipelined(setting, model, batch, stages, CHUNKS, **options))
                    return training(pipes[0], model, batch)

                setting.row(
                    f"{backend}, {stages} stages, remat {policy}",
                    lambda make=make, b=backend, p=policy: make(backend=b, remat=p),  # type: ignore[misc]
                )
                for pipe in pipes:
                    saved = " + ".join(f"{s.peak / 2**30:.2f}" for s in pipe.memory.stages)
                    away = sum(host.peak for host in pipe.memory.hosts) / 2**30
                    print(f"    of which saved by stages {saved} GiB, on the host {away:.2f} GiB")


def trace(setting: Setting) -> None:
    """A step in torch's profiler, saved for Perfetto: labels of actions, and their kernels."""
    stages, chunks = 4, 6
    model, inputs = setting.gpt2(layers=4, sequence=256)
    batch = inputs(chunks)
    with setting.guarded("trace"):
        pipe = pipelined(setting, model, batch, stages, chunks, remat="full")
        step = training(pipe, model, batch)
        step()
        setting.card.synchronize()
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if setting.card.is_gpu else []
        # Without it only the calling thread is in the trace.
        every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        with profile(activities=activities, experimental_config=every_thread) as seen:
            step()
            setting.card.synchronize()
        setting.folder.mkdir(parents=True, exist_ok=True)
        path = setting.folder / "trace.json.gz"
        seen.export_chrome_trace(str(path))
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {len(events)} events")
        print(f"kernels by stream: {dict(kernels_by_stream(events))}")
        faults = missing(events, stages, chunks, kernels=setting.card.is_gpu)
        setting.check("labels and kernels", faults)


LABEL = re.compile(r"([FRBW]+) stage (\d+) micro-batch (\d+)$")


def kernels_by_stream(events: Iterable[Mapping[str, Any]]) -> Counter[Any]:
    """How many kernels each stream ran."""
    kernels = (e for e in events if e.get("cat") == "kernel")
    return Counter(e.get("args", {}).get("stream") for e in kernels)


def missing(
    events: Iterable[Mapping[str, Any]], stages: int, chunks: int, *, kernels: bool
) -> list[str]:
    """What a trace lacks: the label of an action, or kernels on each stage's stream."""
    events = list(events)
    labels = [m for e in events if (m := LABEL.match(str(e.get("name", ""))))]
    found = {(letter, int(m[2]), int(m[3])) for m in labels for letter in m[1]}
    faults = [
        f"no {letter} stage {k} micro-batch {m}"
        for letter in "FB"
        for k in range(stages)
        for m in range(chunks)
        if (letter, k, m) not in found
    ]
    if kernels and len(kernels_by_stream(events)) < stages:
        faults.append(f"kernels on {len(kernels_by_stream(events))} streams only")
    return faults
