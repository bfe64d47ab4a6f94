"""`make` uses an environment of its own for another Python or torch, as CONTRIBUTING.md says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from tests.support.documents import ROOT, command_lines

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def shown(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """What `make` would run."""
    outer = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "VENV", "TORCH")}
    outer = {k: v for k, v in outer.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=outer | (environment or {}),
    )
    return done.stdout


def test_the_usual_environment() -> None:
    for found in (shown("test"), shown("test", environment={"PYTHON": "python3.12"})):
        assert "1 .venv/bin/python -m pytest" in found
        assert "sed '' constraints.txt > .venv/constraints.txt" in found
    assert "python3.12 -m venv .venv" in found


def test_another_python_and_torch() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (line,) = [line for line in command_lines(text) if "PYTHON=" in line]
    program, *arguments = line.split()
    assert program == "make"
    found = shown(*arguments)
    home = ".venv-python3.12-torch2.12.1"
    assert f"python3.12 -m venv {home}" in found
    assert f"1 {home}/bin/python -m pytest" in found
    (pinned,) = re.findall(rf"sed '(.*)' constraints.txt > {home}/constraints.txt", found)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    _, old, new, _ = pinned.split("/")
    assert re.findall(old, pins, re.MULTILINE) == ["torch==2.13.0"]
    assert new == "torch==2.12.1"


def test_every_pip_call_has_the_pins() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    installs = [line for line in text.splitlines() if "$(PIP) install" in line]
    assert installs
    assert all(line.endswith("-c $(PINS)") for line in installs)
