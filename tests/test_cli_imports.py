"""The command's help, its entry point, and what it does without: torch."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import autopipe
from autopipe.cli import main
from tests.support.plans import made_plan

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("arguments", [[], ["plan"], ["simulate"], ["report"], ["trace"]])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: autopipe {' '.join(arguments)}".rstrip())
    for word in ["plan", "simulate", "report", "trace"] if not arguments else ["--help"]:
        assert re.search(rf"^\s+(-h, )?{word}\b", text, re.MULTILINE)


def test_the_entry_point_is_the_command() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '\n[project.scripts]\nautopipe = "autopipe.cli:main"\n' in text


TORCHLESS: dict[str, Sequence[str]] = {
    "help": ["--help"],
    "simulate": [
        "simulate",
        "1f1b",
        "--stages",
        "2",
        "--chunks",
        "2",
        "--forward",
        "1",
        "--backward",
        "1",
    ],
    "report": ["report", "plan.json"],
    "trace": ["trace", "plan.json"],
}


@pytest.mark.parametrize("case", TORCHLESS)
def test_torch_is_not_imported_for(tmp_path: Path, case: str) -> None:
    """It takes seconds; all that these commands do takes tenths of one."""
    made_plan().save(tmp_path / "plan.json")
    code = f"""
import sys
from autopipe.cli import main
try:
    code = main({list(TORCHLESS[case])!r})
except SystemExit as done:
    code = done.code
heavy = {{"torch", "sympy", "numpy", "autopipe.api"}} & set(sys.modules)
sys.exit(f"{{code}} {{heavy}}" if code or heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_names_of_the_package_come_when_they_are_used() -> None:
    assert set(autopipe.__all__) <= set(dir(autopipe))
    for name in autopipe.__all__:
        assert getattr(autopipe, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        autopipe.other  # type: ignore[attr-defined]  # noqa: B018
