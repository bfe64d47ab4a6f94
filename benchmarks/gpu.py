"""Everything that wants a GPU, in parts.

    python -m benchmarks.gpu                        every part, on cuda:0
    python -m benchmarks.gpu --part plain memory    these parts: so a run can be resumed
    python -m benchmarks.gpu --device cpu --tiny    that the parts work; measures nothing

| part | what |
| --- | --- |
| tests | the transparency tests with all stages on cuda:0 (`tests/system/test_gpu.py`) |
| overhead | one stage beside eager torch (`benchmarks.overhead`) |
| plain | GPT-2: eager torch, torch.compile, with CUDA graphs as well |
| one-stage, four-stages | the same as a pipeline on one device, M = 1 and 8, three schedules |
| memory | step time and peak memory by rematerialization, beside gradient accumulation |
| actions | what an action costs the host |
| simulated | throughput on 2, 4, 8 devices, simulated from phases measured here |
| predictions | planned with `profile=True` and run, predicted beside measured |
| kernels | operators and saved bytes of plans made elsewhere, beside those that run here |
| inductor-one-stage, inductor-four-stages | with `backend="inductor"` |

GPT-2 has 24 layers, d 1024, 16 heads, sequence 1024, batch 8, and bfloat16 weights without
autocast; steps are without an optimizer, medians of 7. A part that fails is printed, and the others
go on. The order is that of worth: the parts at the end compile for longest. Prints what belongs
into RESULTS.md, the machine named. Exits with 2 where there is no such device, with 1 if something
failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import gpu_kernels, gpu_predictions, gpu_steps, overhead
from benchmarks.gpu_setting import Setting


def tests(setting: Setting) -> None:
    if setting.device.type != "cuda":
        print("left out: they need CUDA")
    elif subprocess.call([sys.executable, "-m", "pytest", "-q", "tests/system/test_gpu.py"]):
        raise RuntimeError("the tests failed")


def plain_overhead(setting: Setting) -> None:
    overhead.main(1 if setting.tiny else 15, setting.device)


PARTS: dict[str, Callable[[Setting], None]] = {
    "tests": tests,
    "overhead": plain_overhead,
    "plain": gpu_steps.plain,
    "one-stage": gpu_steps.one_stage,
    "four-stages": gpu_steps.four_stages,
    "memory": gpu_steps.memory,
    "actions": gpu_steps.actions,
    "simulated": gpu_predictions.simulated,
    "predictions": gpu_predictions.predictions,
    "kernels": gpu_kernels.kernels,
    "inductor-one-stage": gpu_steps.inductor_one_stage,
    "inductor-four-stages": gpu_steps.inductor_four_stages,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME",
                        help=", ".join(PARTS))  # fmt: skip
    parser.add_argument("--device", default="cuda:0", type=torch.device)
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it works")
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return 2
    setting = Setting(options.device, options.tiny)
    print(setting.name, flush=True)
    for name in options.part:
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        with setting.guarded(name):
            PARTS[name](setting)
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(f"\nfailed: {', '.join(setting.failed) or 'nothing'}")
    return 1 if setting.failed else 0


if __name__ == "__main__":
    sys.exit(main())
