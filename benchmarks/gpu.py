"""Everything that wants a GPU, in one go.

    python -m benchmarks.gpu            # on a machine with CUDA; about ten minutes

1. the transparency tests with all stages on cuda:0 (`tests/system/test_gpu.py`);
2. the overhead figure (`benchmarks.overhead` chooses cuda:0 by itself);
3. peak memory of GPT-2 (24 layers, d 1024, sequence 512), batch 8 in 8 micro-batches, two stages on
   cuda:0, for remat none, full and min-cut, beside plain gradient accumulation over micro-batches;
4. the same model in one stage, planned with `profile=True` and run: predicted against measured step
   time (bar 10 %) and peak memory (parameters, gradients, micro-batches; bar 5 %), at three numbers
   of micro-batches, with three policies.

Prints what belongs into RESULTS.md, the machine named. Exits with 2 where there is no GPU.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time

import torch

import autopipe
from benchmarks.models import gpt2

from . import overhead

CHUNKS = 8


def peak(step: object) -> float:
    """GiB allocated at most during one step, after a warm-up step."""
    assert callable(step)
    step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def memory() -> None:
    device = torch.device("cuda:0")
    model, inputs = gpt2(layers=24, width=1024, heads=16, sequence=512, vocabulary=50257)
    model.to(device)
    batch = {name: x.to(device) for name, x in inputs(8).items()}

    def accumulate() -> None:
        for chunk in range(CHUNKS):
            part = {name: x[chunk : chunk + 1] for name, x in batch.items()}
            (model(**part).loss / CHUNKS).backward()
        model.zero_grad()

    print(f"plain, micro-batches one after the other: {peak(accumulate):.2f} GiB")
    for remat in ("none", "full", "min-cut"):
        pipe = autopipe.compile(model, [device, device], CHUNKS, remat=remat, kwargs=batch)

        def step(pipe: autopipe.Pipeline = pipe) -> None:
            pipe(**batch).loss.backward()
            model.zero_grad()

        saved = " + ".join(f"{s.peak / 2**30:.2f}" for s in pipe.memory.stages)
        print(f"remat {remat}: {peak(step):.2f} GiB at most", end="")
        saved = " + ".join(f"{s.peak / 2**30:.2f}" for s in pipe.memory.stages)
        print(f", of which saved by stages {saved} GiB")


def predictions() -> None:
    """One stage: with several on one GPU nothing says how they share it."""
    device = torch.device("cuda:0")
    for chunks in (2, 4, 8):
        for remat in ("none", "full", "min-cut"):
            model, inputs = gpt2(layers=12, width=1024, heads=16, sequence=512, vocabulary=50257)
            model.to(device)
            batch = {name: x.to(device) for name, x in inputs(16).items()}
            plan = autopipe.plan(model, [device], chunks, remat=remat, profile=True, kwargs=batch)
            pipe = autopipe.compile(model, plan=plan, kwargs=batch)

            def step(
                pipe: autopipe.Pipeline = pipe, batch: dict[str, torch.Tensor] = batch
            ) -> None:
                pipe.zero_grad()
                pipe(**batch).loss.backward()

            (stage,) = plan.stages
            predicted = stage.memory_bytes - stage.optimizer_bytes
            measured = peak(step) * 2**30
            seconds = []
            for _ in range(5):
                torch.cuda.synchronize()
                start = time.perf_counter()
                step()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            found = statistics.median(seconds)
            print(
                f"remat {remat}, M={chunks}: step predicted {1e3 * plan.step_seconds:.1f} ms,"
                f" measured {1e3 * found:.1f} ms ({plan.step_seconds / found - 1:+.1%}); memory"
                f" predicted {predicted / 2**30:.2f} GiB, measured {measured / 2**30:.2f} GiB"
                f" ({predicted / measured - 1:+.1%})",
                flush=True,
            )
            del pipe, model


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return 2
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    failed = subprocess.call([sys.executable, "-m", "pytest", "-q", "tests/system/test_gpu.py"])
    overhead.main()
    memory()
    predictions()
    return failed


if __name__ == "__main__":
    sys.exit(main())
