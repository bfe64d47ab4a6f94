"""A progress bar on terminals, lines elsewhere, and no thread that stays."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from tqdm import tqdm

from autopipe import progress
from autopipe.progress import Progress, silent


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.001)


def until(shown: Callable[[], str], text: str) -> None:
    """Wait until something is shown."""
    end = time.monotonic() + 30
    while text not in shown():
        assert time.monotonic() < end, shown()


def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with Progress(2) as bar:
        for step in ("capturing", "splitting"):
            bar(step)
    with Progress(2):
        pass  # nothing to do
    assert threading.active_count() == before
    silent("anything")
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("soon")
def test_lines_in_a_log_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a step that never ends: the first line does not wait for the second step."""
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress(2) as bar:
        bar("capturing")
        until(log.getvalue, "capturing")
        bar("tracing stage 0")
        until(log.getvalue, "stage 0")
    lines = log.getvalue().splitlines()
    assert [line.split(" (")[0] for line in lines[:2]] == [
        "autopipe: capturing",
        "autopipe: tracing stage 0",
    ]
    assert re.fullmatch(r"autopipe: compiled in \d+\.\d s", lines[2])
    assert len(lines) == 3
    assert "\r" not in log.getvalue()


SCRIPT = """
import sys, threading
from autopipe import progress
assert progress.DELAY == 1.0
with progress.Progress(2) as bar:
    bar("capturing")
    sys.stdin.readline()
    bar("costing")
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_in_a_process_of_its_own(terminal: bool) -> None:
    """A pseudo-terminal has a bar that goes away; a pipe has lines without carriage returns."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        assert process.stdin is not None
        found = b""
        while b"capturing" not in found:  # it waits for us, within its first step
            found += os.read(ours, 1000)
        process.stdin.write(b"\n")
        process.stdin.close()
        with suppress(OSError):  # EIO: how Linux ends a pseudo-terminal
            while part := os.read(ours, 1000):
                found += part
    os.close(ours)
    assert process.returncode == 0
    if terminal:
        assert b"autopipe:" in found
        assert b"0/6" in found
        assert found.endswith(b"\r")
    else:
        assert b"\r" not in found
        assert found.startswith(b"autopipe: capturing (step 1, after 1 s)\n")


class GoneTerminal:
    """A terminal that was closed while a program ran."""

    def __init__(self, error: Exception, fails: str) -> None:
        self.error, self.fails = error, fails
        self.failed = threading.Event()

    def isatty(self) -> bool:
        return self._do("isatty") is None

    def write(self, text: str) -> int:
        self._do("write")
        return len(text)

    def flush(self) -> None:
        self._do("flush")

    def _do(self, what: str) -> None:
        if what == self.fails:
            self.failed.set()
            raise self.error


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("fails", ["isatty", "write", "flush"])
@pytest.mark.parametrize(
    "error",
    [OSError(5, "gone"), OSError(28, "full"), BrokenPipeError(), ValueError("closed file")],
    ids=["EIO", "ENOSPC", "EPIPE", "closed"],
)
def test_compiling_goes_on_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, error: Exception, fails: str
) -> None:
    terminal = GoneTerminal(error, fails)
    monkeypatch.setattr(sys, "stderr", terminal)
    before = threading.active_count()
    with Progress(2) as bar:
        for step in ("capturing", "costing", "writing"):
            bar(step)
        assert terminal.failed.wait(30)
    assert threading.active_count() == before
    another = threading.Thread(target=tqdm, kwargs={"disable": True}, daemon=True)
    another.start()
    another.join(30)
    assert not another.is_alive()  # other bars of the process go on


@pytest.mark.usefixtures("soon")
def test_a_program_without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with Progress(2) as bar:
        bar("capturing")
        assert bar._thread is not None
        bar._thread.join(30)
        assert not bar._thread.is_alive()
