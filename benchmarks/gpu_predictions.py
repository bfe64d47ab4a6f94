"""Parts of `benchmarks.gpu`: predicted beside measured steps, and what 8 devices would do."""

from __future__ import annotations

from typing import NamedTuple

import autopipe
from autopipe.passes.devices import H100
from autopipe.planning.measured import Measured
from benchmarks.gpu_setting import Setting, pipelined, training

COUNTS = (2, 4, 8)
MANY = 32
GPIPE_TABLE_2 = {
    "AmoebaNet-D, on TPUs": (1.21, 1.84, 3.48),
    "Transformer-48, on TPUs": (1.8, 3.4, 6.3),
}
"""GPipe (arXiv 1811.06965), Table 2: throughput with M = 32 on K = 2, 4, 8 devices."""


def predictions(setting: Setting) -> None:
    """One stage, planned with `profile=True`: with several on one GPU nothing says how they share.

    Bars: step time 10 %, peak memory (parameters, gradients, micro-batches) 5 %.
    """
    for chunks in (2, 4, 8):
        for remat in ("none", "full", "min-cut"):
            with setting.guarded(f"remat {remat}, M={chunks}"):
                model, inputs = setting.gpt2(layers=12, sequence=512)
                batch = inputs(16)
                plan = autopipe.plan(
                    model, [setting.device], chunks, remat=remat, profile=True, kwargs=batch
                )
                pipe = autopipe.compile(model, plan=plan, kwargs=batch)
                step = training(pipe, model, batch)
                (stage,) = plan.stages
                predicted = stage.memory_bytes - stage.optimizer_bytes
                found, used = setting.seconds(step), setting.peak(step) * 2**30
                print(
                    f"remat {remat}, M={chunks}: step predicted {1e3 * plan.step_seconds:.1f} ms,"
                    f" measured {1e3 * found:.1f} ms ({plan.step_seconds / found - 1:+.1%});"
                    f" memory predicted {predicted / 2**30:.2f} GiB,"
                    f" measured {used / 2**30:.2f} GiB ({predicted / used - 1:+.1%})",
                    flush=True,
                )


class StageTimes(NamedTuple):
    """Seconds of one micro-batch at each of K stages; of a transfer between two of them."""

    forward: tuple[float, ...]
    recompute: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    transfer: float

    def step(self, kind: str, chunks: int) -> autopipe.Timeline:
        return autopipe.simulate(
            kind,
            stages=len(self.forward),
            chunks=chunks,
            forward=self.forward,
            backward=self.backward,
            weight=self.weight,
            recompute=self.recompute,
            transfer=self.transfer,
            early_recompute=True,
        )


def stage_times(measured: Measured) -> StageTimes:
    """From steps of one micro-batch under zb-h1: no two stages compute at the same time.

    Where R and B are one action (the last stage), both count as B.
    """
    rows = measured.phase_seconds
    plan = measured.plan
    last = len(rows) - 1
    return StageTimes(
        tuple(row["F"] for row in rows),
        tuple(row.get("R", 0.0) for row in rows),
        tuple(next(t for phase, t in row.items() if "B" in phase) for row in rows),
        tuple(row.get("W", 0.0) for row in rows),
        H100.link.seconds(max((plan.received_bytes(k + 1) for k in range(last)), default=0)),
    )


def simulated(setting: Setting) -> None:
    """Throughput on 2, 4 and 8 devices with M = 32, simulated from times measured on one.

    All K stages are on one device, with one micro-batch of 4 samples, so that they run one after
    the other: each phase has the device to itself. As in Table 2 of GPipe's paper, 1 is the
    throughput of K = 2 with M = 1. Transfers take what an H100's NVLink does.
    """
    print("SIMULATED from phase times of one device; GPT-2, full rematerialization, early R")
    known = {}
    for K in COUNTS:
        with setting.guarded(f"K={K}"):
            model, inputs = setting.gpt2(tiny=max(COUNTS))
            batch = inputs(4)
            pipe = pipelined(setting, model, batch, K, 1, schedule="zb-h1", remat="full")
            step = training(pipe, model, batch)
            setting.seconds(step)
            with pipe.profile() as measured:
                for _ in range(setting.rounds):
                    step()
            known[K] = times = stage_times(measured)
            for letter, row in zip("FRBW", times[:4], strict=True):
                print(f"K={K} {letter}: " + " ".join(f"{1e3 * t:.3f}" for t in row) + " ms")
            print(f"K={K} transfer: {1e6 * times.transfer:.0f} µs", flush=True)
    if 2 not in known:
        return
    print(f"{'throughput, M = 32':28}" + "".join(f"   K={K:<4}" for K in COUNTS))
    alone = known[2].step("gpipe", 1).makespan
    for kind in ("gpipe", "1f1b", "zb-h1", "zb-h2"):
        steps = {K: times.step(kind, MANY).makespan for K, times in known.items()}
        found = [f"{MANY * alone / steps[K]:.2f}" if K in steps else "-" for K in COUNTS]
        print(f"{kind + ', simulated':28}" + " ".join(f"{x:>8}" for x in found))
    for name, published in GPIPE_TABLE_2.items():
        print(f"{'GPipe: ' + name:28}" + " ".join(f"{x:8.2f}" for x in published))
    ideal = [MANY * K / (MANY + K - 1) for K in COUNTS]
    print(f"{'KM/(M+K-1)':28}" + " ".join(f"{x:8.2f}" for x in ideal), flush=True)
