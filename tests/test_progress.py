"""The progress bar: nothing where nobody watches, and no thread that stays."""

from __future__ import annotations

import sys
import threading

import pytest

from autopipe.progress import Progress, silent


class Terminal:
    """A stream that says that it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_nothing_is_written_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2) as progress:
        for text in ("capture", "split"):
            progress(text)
            silent(text)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("delay", [0, 1])
def test_a_terminal_sees_a_bar_after_the_delay(
    monkeypatch: pytest.MonkeyPatch, delay: float
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("autopipe.progress.DELAY_SECONDS", delay)
    threads = threading.active_count()
    with Progress(2) as progress:
        progress("capture")
        progress("split")
        assert threading.active_count() == threads
    assert ("autopipe" in terminal.text) == (delay == 0)
