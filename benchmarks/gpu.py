"""Everything that wants a GPU, in one go.

    python -m benchmarks.gpu            # on a machine with CUDA; about ten minutes

1. the transparency tests with all stages on cuda:0 (`tests/test_gpu.py`);
2. the overhead figure (`benchmarks.overhead` chooses cuda:0 by itself);
3. peak memory of GPT-2 (24 layers, d 1024, sequence 512), batch 8 in 8 micro-batches, two stages on
   cuda:0, for remat none, full and min-cut, beside plain gradient accumulation over micro-batches.

Prints what belongs into RESULTS.md, the machine named. Exits with 2 where there is no GPU.
"""

from __future__ import annotations

import subprocess
import sys

import torch

import autopipe

from . import overhead
from .models import gpt2

CHUNKS = 8


def peak(step: object) -> float:
    """GiB allocated at most during one step, after a warm-up step."""
    assert callable(step)
    step()
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


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return 2
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    failed = subprocess.call([sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py"])
    overhead.main()
    memory()
    return failed


if __name__ == "__main__":
    sys.exit(main())
