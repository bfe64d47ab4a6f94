"""A progress bar on terminals, nothing elsewhere, and no thread that stays."""

from __future__ import annotations

import threading

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
