"""A progress bar on terminals, nothing elsewhere, and no thread that stays."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from autopipe import progress
from autopipe.progress import Progress, silent


def test_nothing_is_written_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with Progress(2) as bar:
        for step in ("capturing", "splitting"):
            bar(step)
        assert threading.active_count() == before
    silent("anything")
    assert capsys.readouterr() == ("", "")


def test_each_step_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class Bar:
        def __init__(self, total: int, **options: object) -> None:
            seen.append((total, options["delay"], options["leave"]))

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            seen.append(text)

        def update(self) -> None:
            seen.append(1)

        def close(self) -> None:
            seen.append("closed")

    monkeypatch.setattr(progress, "_Bar", Bar)
    with Progress(3) as bar:
        bar("capturing")
        bar("costing")
    assert seen == [(7, 1, False), "capturing", 1, "costing", 1, "closed"]
    with Progress(3):
        pass  # nothing to do: no bar
    assert len(seen) == 6


class GoneTerminal:
    """A terminal that was closed while a program ran."""

    def __init__(self, error: Exception, fails: str) -> None:
        self.error, self.fails = error, fails

    def isatty(self) -> bool:
        return self._do("isatty") is None

    def write(self, text: str) -> int:
        self._do("write")
        return len(text)

    def flush(self) -> None:
        self._do("flush")

    def _do(self, what: str) -> None:
        if what == self.fails:
            raise self.error


@pytest.mark.parametrize("fails", ["isatty", "write", "flush"])
@pytest.mark.parametrize(
    "error",
    [OSError(5, "gone"), OSError(28, "full"), BrokenPipeError(), ValueError("closed file")],
    ids=["EIO", "ENOSPC", "EPIPE", "closed"],
)
def test_compiling_goes_on_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, error: Exception, fails: str
) -> None:
    monkeypatch.setattr(sys, "stderr", GoneTerminal(error, fails))
    monkeypatch.setattr(progress._Bar, "__init__", at_once(progress._Bar.__init__))
    with Progress(2) as bar:
        for step in ("capturing", "costing", "writing"):
            bar(step)


def at_once(made: Callable[..., None]) -> Callable[..., None]:
    """A bar that is shown without a delay."""

    def init(self: object, *args: Any, **options: Any) -> None:
        made(self, *args, **{**options, "delay": 0, "mininterval": 0})

    return init


def test_a_program_without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(progress._Bar, "__init__", at_once(progress._Bar.__init__))
    with Progress(2) as bar:
        bar("capturing")
        bar("costing")
