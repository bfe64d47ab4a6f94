"""The first training step, in units of that of torch.compile.

    python -m benchmarks.first_call [repetitions]

GPT-2 (12 layers, d 768, sequence 256, batch 8). Each measurement is a process of its own: seconds
on the clock from the call that compiles to the end of the first backward, without the import of
torch and without building the model. `eager` is the model itself, `autopipe` two stages with M =
4, `inductor` is `torch.compile` with an empty cache (its C++ is compiled on all cores, the rest
has one thread). Medians; they alternate. Bar: no slower than inductor.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = ("eager", "autopipe", "inductor")


def measure(kind: str) -> float:
    """Seconds of the first step in this process."""
    import torch

    import autopipe
    from benchmarks.models import gpt2

    torch.set_num_threads(1)
    model, inputs = gpt2(12, 768, 12, 256, vocabulary=1024)
    batch = inputs(8)
    start = time.perf_counter()
    run = {
        "eager": lambda: model,
        "autopipe": lambda: autopipe.compile(model, ["cpu", "cpu"], 4),
        "inductor": lambda: torch.compile(model),
    }[kind]()
    run(**batch).loss.backward()
    return time.perf_counter() - start


def in_own_process(kind: str) -> float:
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.first_call", kind],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": empty, "OMP_NUM_THREADS": "1"},
        )
    return float(done.stdout.split()[-1])


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in KINDS:
        print(measure(sys.argv[1]))
        return
    repetitions = int(sys.argv[1]) if sys.argv[1:] else 5
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(repetitions):
        for kind in KINDS:
            seconds[kind].append(in_own_process(kind))
            print(f"{kind} {seconds[kind][-1]:.1f} s", flush=True)
    for kind, found in seconds.items():
        print(f"{kind:9} {statistics.median(found):6.1f} s  ({min(found):.1f} to {max(found):.1f})")
    ratio = statistics.median(seconds["autopipe"]) / statistics.median(seconds["inductor"])
    print(f"autopipe / inductor: {ratio:.2f}")


if __name__ == "__main__":
    main()
