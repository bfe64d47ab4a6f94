"""Parts of `benchmarks.gpu`: the tests that need a GPU, also under torch's CUDA sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

from benchmarks.gpu_setting import Setting

FILES = tuple(f"tests/system/test_gpu{name}.py" for name in ("", "_callers", "_kernels"))
SANITIZER = "TORCH_CUDA_SANITIZER"
RACE = re.compile(r"CSAN detected a possible data race on tensor with data pointer \d+")
KERNEL = re.compile(r"during kernel:\s+([\w:.]+)")
UNSEEN = "not kernel_that_fails and not trace and not host_wait"
"""Tests that the sanitizer may disturb, and that are not about the order of kernels."""
PROCESSES = 6


def tests(setting: Setting) -> None:
    """The tests marked `gpu` of the first tier."""
    _pytest(setting, "tests", "gpu and not full", FILES, {})


def all_tests(setting: Setting) -> None:
    """Those of the full tier."""
    _pytest(setting, "tests of the full tier", "gpu and full", FILES, {})


def sanitizer(setting: Setting) -> None:
    """The same as `tests`; each operator also goes through Python, and its accesses are checked."""
    text = _pytest(setting, "sanitizer", "gpu and not full", FILES[:2], {SANITIZER: "1"}, UNSEEN)
    for race, count in races(text).items():
        print(f"{count} times: {race}")


def _pytest(
    setting: Setting,
    what: str,
    marks: str,
    files: tuple[str, ...],
    variables: Mapping[str, str],
    names: str = "",
) -> str:
    """Run tests in a process of its own, and show what it prints."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", marks, "--durations=8"]
    command += ["-o", "faulthandler_timeout=120", "-p", "no:cacheprovider", *files, "-k", names]
    if not setting.card.is_gpu:  # all are skipped, or fail to import
        variables = {}
    else:
        # cuBLAS gives the same bits on every stream.
        variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **variables}
    if setting.card.is_gpu and importlib.util.find_spec("xdist"):
        command += ["-n", str(PROCESSES)]
    limit = None if setting.end is None else max(1.0, setting.end - time.monotonic() - 10)
    process = subprocess.Popen(
        command,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers, too: they may hang on the GPU
        output, _ = process.communicate()
    status = process.returncode
    text = output.decode(errors="replace")
    print(text[-20_000:], flush=True)
    setting.check(what, faults_of_tests(status, text, setting.card.is_gpu))
    return text


def faults_of_tests(status: int, text: str, is_gpu: bool) -> list[str]:
    """What pytest reports.

    Args:
        status: of its process.
        text: what it printed.
        is_gpu: whether tests have to have run.
    """
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    if status not in (0, 5 if not is_gpu else 0):
        return [f"pytest ended with {status}: {last}"]
    if is_gpu and not re.search(r"\b[1-9]\d* passed", last):
        return [f"no test passed: {last}"]
    return [f"{sum(races(text).values())} data races"] if races(text) else []


def races(text: str) -> dict[str, int]:
    """What the sanitizer prints: the two kernels of each race, without addresses, how often."""
    found: dict[str, int] = {}
    for part in RACE.split(text)[1:]:
        names = KERNEL.findall(part.partition("=" * 20)[0])
        line = " after ".join(names[:2]) or "unknown kernels"
        found[line] = found.get(line, 0) + 1
    return found
