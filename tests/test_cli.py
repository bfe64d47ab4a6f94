"""The command line: its help, its entry points, how it finds commands, what it does not import.

Covers cli.py, version.py and commands/__init__.py.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import autopipe
import autopipe.commands
from autopipe.cli import main
from autopipe.commands import all_commands
from tests.support.command_line import run
from tests.support.plans import made_plan

ROOT = Path(__file__).parents[1]


COMMANDS = [command.name for command in all_commands()]


def test_the_commands() -> None:
    assert {"plan", "report", "simulate", "trace"} <= {*COMMANDS}
    assert sorted(COMMANDS) == COMMANDS


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: autopipe {' '.join(arguments)}".rstrip())
    for word in COMMANDS if not arguments else ["--help"]:
        assert re.search(rf"^\s+(-h, )?{word}\b", text, re.MULTILINE)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"autopipe {autopipe.__version__}\n"
    assert importlib.metadata.version("torch-autopipe") == autopipe.__version__


HELLO = """
from autopipe.commands import Command
from autopipe.errors import OptionError

def run(options):
    if options.name == "nobody":
        raise OptionError("nobody is there")
    print("hello", options.name)

COMMAND = Command("hello", "greet", "Greet.", lambda parser: parser.add_argument("name"), run)
"""


def test_a_command_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hello.py").write_text(HELLO)
    (tmp_path / "_helper.py").write_text("")
    monkeypatch.setattr(autopipe.commands, "__path__", [*autopipe.commands.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "autopipe.commands.hello", raising=False)
    assert main(["hello", "world"]) == 0
    assert capsys.readouterr().out == "hello world\n"
    assert main(["hello", "nobody"]) == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "    hello     greet\n" in capsys.readouterr().out


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
from autopipe.commands import all_commands
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
    assert dir(autopipe) == sorted([*autopipe.__all__, "__version__"])
    for name in autopipe.__all__:
        assert getattr(autopipe, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        autopipe.other  # type: ignore[attr-defined]  # noqa: B018


def test_python_m_autopipe_is_the_command() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: autopipe")
    assert run().returncode == 2
