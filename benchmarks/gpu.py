"""Everything that wants a GPU, for half an hour on one, in parts.

    python -m benchmarks.gpu                        every part, on cuda:0
    python -m benchmarks.gpu --minutes 9.5          as many as fit; says how to resume
    python -m benchmarks.gpu --part plain remat     these parts
    python -m benchmarks.gpu --device cpu --tiny    that the parts work; measures nothing

| part | what |
| --- | --- |
| tests | the tests marked `gpu` of the first tier |
| sanitizer | the same under torch's CUDA sanitizer |
| sync | warm steps in which the host may not wait for the device |
| leaks | 50 steps of a ResNet and a GPT-2: what grows |
| calls | operator calls that one process issues a second, beside the plan's figure |
| side-streams | inputs anywhere, any stream of the caller, kernels that sleep: equal bits |
| kernels | operators and saved bytes of plans made elsewhere, beside those that run here |
| remat | step time and peak memory by rematerialization and backend |
| failures | what a user reads after an error of a kernel, and without free memory |
| trace | a step in torch's profiler, saved for Perfetto |
| overhead | one stage beside eager torch (`benchmarks.overhead`) |
| plain | GPT-2: eager torch, torch.compile, with CUDA graphs as well |
| one-stage, four-stages | the same as a pipeline on one device, M = 1 and 8, three schedules |
| actions | what an action costs the host |
| simulated | throughput on 2, 4, 8 devices, simulated from phases measured here |
| predictions | planned with `profile=True` and run, predicted beside measured |
| inductor-one-stage, inductor-four-stages | with `backend="inductor"` |
| all-tests | the tests marked `gpu` of the full tier |

GPT-2 has 24 layers, d 1024, 16 heads, sequence 1024, batch 8, and bfloat16 weights without
autocast, where a part says nothing else; steps are without an optimizer, medians of 7. The order is
that of worth.

On a GPU each part is a process, so that an error of a kernel leaves the others; it prints the
stacks of its threads and ends when its limit is over. What is printed belongs into RESULTS.md, and
is also written to `gpu.log`, in the folder that `$OUT` names, or `gpu_results`. Exits with 2 where
there is no such device, with 1 if something failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import (
    gpu_failures,
    gpu_kernels,
    gpu_order,
    gpu_predictions,
    gpu_remat,
    gpu_steady,
    gpu_steps,
    gpu_tests,
    overhead,
)
from benchmarks.gpu_setting import Setting

START, GRACE = 15, 20
"""Seconds until a process works on the GPU; that it may take for its imports beside its limit."""


PROGRESS = "autopipe: "
"""How the lines begin that say how far a capture is."""
VERDICT = "failed: "
"""How the last line of a part begins."""


class Part(NamedTuple):
    """A part of the script.

    Attributes:
        run: prints what it finds.
        seconds: that it is expected to take on an H100. Not measured.
        limit: after which it is ended.
    """

    run: Callable[[Setting], None]
    seconds: int
    limit: int


def plain_overhead(setting: Setting) -> None:
    overhead.main(1 if setting.tiny else 15, setting.device)


PARTS: dict[str, Part] = {
    "tests": Part(gpu_tests.tests, 150, 300),
    "sanitizer": Part(gpu_tests.sanitizer, 150, 300),
    "sync": Part(gpu_order.sync, 40, 100),
    "leaks": Part(gpu_steady.leaks, 60, 120),
    "calls": Part(gpu_steady.calls, 20, 60),
    "side-streams": Part(gpu_order.side_streams, 40, 120),
    "kernels": Part(gpu_kernels.kernels, 60, 150),
    "remat": Part(gpu_remat.remat, 160, 300),
    "failures": Part(gpu_failures.failures, 50, 150),
    "trace": Part(gpu_remat.trace, 20, 60),
    "overhead": Part(plain_overhead, 20, 60),
    "plain": Part(gpu_steps.plain, 120, 240),
    "one-stage": Part(gpu_steps.one_stage, 30, 90),
    "four-stages": Part(gpu_steps.four_stages, 50, 120),
    "actions": Part(gpu_steps.actions, 15, 60),
    "simulated": Part(gpu_predictions.simulated, 60, 150),
    "predictions": Part(gpu_predictions.predictions, 120, 240),
    "inductor-one-stage": Part(gpu_steps.inductor_one_stage, 120, 240),
    "inductor-four-stages": Part(gpu_steps.inductor_four_stages, 180, 300),
    "all-tests": Part(gpu_tests.all_tests, 200, 300),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME",
                        help=", ".join(PARTS))  # fmt: skip
    parser.add_argument("--device", default="cuda:0", type=torch.device)
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it works")
    parser.add_argument("--minutes", type=float, default=30.0, help="no part begins that would not"
                        " fit into the rest of them")  # fmt: skip
    parser.add_argument("--together", action="store_true", help="all parts in this process")
    parser.add_argument(
        "--limit", type=float, help="end, and print all stacks, after so many seconds"
    )
    options = parser.parse_args(arguments)
    device: torch.device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return 2
    folder = Path(os.environ.get("OUT") or "gpu_results")
    if device.type == "cuda" and not options.together:
        log = Log(folder)
        return apart(options.part, options.minutes, log, lambda name: of_part(name, options))
    setting = Setting(device, options.tiny, folder)
    if options.limit:
        setting.end = time.monotonic() + options.limit
        faulthandler.dump_traceback_later(options.limit, exit=True)
    print(setting.name, flush=True)
    for name in options.part:
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        with setting.guarded(name):
            PARTS[name].run(setting)
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(f"\nrefused: {'; '.join(setting.refused) or 'nothing'}")
    print(f"{VERDICT}{'; '.join(setting.failed) or 'nothing'}", flush=True)
    return 1 if setting.failed else 0


class Log:
    """What is printed, and kept in a file.

    Args:
        folder: of the file `gpu.log`, to which is added.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "gpu.log"

    def __call__(self, text: str) -> None:
        if not text.startswith(PROGRESS):  # in the file only
            print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")


def of_part(name: str, options: argparse.Namespace) -> list[str]:
    """The command that runs one part in a process of its own."""
    command = [sys.executable, "-u", "-m", "benchmarks.gpu", "--together", "--part", name]
    command += ["--device", str(options.device)]
    return command + (["--tiny"] if options.tiny else [])


def apart(
    names: Sequence[str], minutes: float, log: Log, command: Callable[[str], list[str]]
) -> int:
    """Run each part in a process of its own, as long as the next is expected to fit.

    Args:
        names: of the parts, in order.
        minutes: for all of them.
        log: for what is printed.
        command: name → the command that runs it.

    Returns:
        The exit status.
    """
    end = time.monotonic() + 60 * minutes
    expected = sum(PARTS[name].seconds + START for name in names)
    log(f"{len(names)} parts, about {expected / 60:.0f} minutes, of which there are {minutes:g}")
    rows: list[str] = []
    left: list[str] = []
    failed = False
    for name in names:
        rest, part = end - time.monotonic(), PARTS[name]
        if rest < part.seconds + START:
            left.append(name)
            continue
        limit = min(part.limit, rest - GRACE)
        log(f"\n=== {name}: about {part.seconds} s, at most {limit:.0f}; {rest:.0f} s are left")
        start = time.monotonic()
        status, verdict = run(command(name), limit, log)
        failed |= status != 0
        rows.append(f"{name:20} {time.monotonic() - start:4.0f} s  {verdict or f'status {status}'}")
        log(f"=== {rows[-1]}")
    log("\n" + "\n".join(rows))
    if left:
        log(f"no time was left for: python -m benchmarks.gpu --part {' '.join(left)}")
    return 1 if failed or left else 0


def run(command: list[str], limit: float, log: Log) -> tuple[int, str]:
    """Run a command, and keep what it prints.

    Args:
        command: takes `--limit` seconds, after which it ends by itself.
        limit: seconds; somewhat later it is killed, and the processes that it began.
        log: for what it prints.

    Returns:
        Its exit status, and the last line that says what failed; empty if there is none.
    """
    killed = ["timeout", "--kill-after=5", str(limit + GRACE)]
    process = subprocess.Popen(
        [*(killed if shutil.which("timeout") else ()), *command, "--limit", str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    verdict = ""
    for line in process.stdout:
        log(line.rstrip("\n"))
        verdict = line.strip() if line.startswith(VERDICT) else verdict
    return process.wait(), verdict


if __name__ == "__main__":
    sys.exit(main())
