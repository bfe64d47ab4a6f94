"""What the README shows works: its Python runs, its names exist, its command lines run.

The README's own lines are executed. Only what it leaves open is filled in: the batches of a loop, a
model, and a smaller model in place of GPT-2 XL in commands (its full size: test_plan.py).
"""

from __future__ import annotations

import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autopipe
from autopipe.cli import EXAMPLES, main
from autopipe.commands import all_commands
from autopipe.report.stages import BoundaryTensor, StageView
from tests.support.documents import ROOT, blocks, command_lines, names, stage_columns

README = (ROOT / "README.md").read_text(encoding="utf-8")
XL = ROOT / "examples" / "gpt2_xl.py"
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="`devices=2` means two GPUs, or no GPU"
)

# ----------------------------------------------------------------------------------------- Python


class Small(nn.Module):
    """Nine layers: enough for eight stages."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def test_every_python_block_is_tested() -> None:
    first, second = blocks(README, "python")
    assert "for ids in batches:" in first
    assert "autopipe.plan(" in second


@needs_two
def test_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """They train: the loss falls; and `explain()` has the lines that the README shows of it."""
    torch.manual_seed(0)
    ids = torch.randint(50257, (4, 16))
    code, _ = blocks(README, "python")
    loop = code.replace(
        "    loss.backward()\n", "    losses.append(loss.item())\n    loss.backward()\n"
    )
    scope: dict[str, Any] = {"batches": [ids] * 3, "losses": []}
    exec(compile(loop, "README.md", "exec"), scope)
    first, *_, last = scope["losses"]
    assert last < first
    pipe = scope["pipe"]
    (shown,) = [b for b in blocks(README, "text") if "schedule gpipe" in b]
    found = str(pipe.explain())
    heads, shown_heads = map(list, map(stage_columns, (found, shown)))
    assert [head for head in heads if head in shown_heads] == shown_heads  # (test_examples: values)
    assert len(found.splitlines()[1:4]) == 3
    assert "between stages:\n" in found
    for name in names(README):
        if re.fullmatch(r"pipe(\.\w+|\[\d\])+", name.replace("[k]", "[0]")):
            assert eval(name.replace("[k]", "[0]"), {"pipe": pipe}) is not None, name
    capsys.readouterr()


@needs_two
def test_verify_prints_what_the_readme_shows() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    pipe = autopipe.compile(model, devices=2, chunks=2)
    found = str(pipe.verify(torch.randn(4, 4))).splitlines()
    (shown,) = re.findall(r"^  ```text\n(.*?)^  ```$", README, re.DOTALL | re.MULTILINE)
    head, output, gradient, note = (line.strip() for line in shown.splitlines())
    assert found[0].split() == head.split()
    assert [line.split()[0] for line in found[1:3]] == [output.split()[0], gradient.split()[0]]
    assert found[-1] == note


def test_a_plan_before_any_gpu_is_rented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _, code = blocks(README, "python")
    assert code.count("model, batch = ...\n") == 1
    assert code.count('plan.save("plan.json") writes it') == 1
    code = code.replace(
        "model, batch = ...\n", "model, batch = Small(), {'x': torch.zeros(64, 8)}\n"
    )
    code = code.replace("print(plan)", "plan.save('plan.json'); print(plan)")
    scope: dict[str, Any] = {"torch": torch, "autopipe": autopipe, "Small": Small}
    exec(compile(code, "README.md", "exec"), scope)
    assert capsys.readouterr().out == f"{autopipe.Plan.load('plan.json')}\n"
    assert len(scope["plan"].stages) == 8
    model, x = Small(), torch.randn(64, 8)
    pipe = autopipe.compile(model, plan="plan.json", args=(x,))
    assert pipe.plan.starts == scope["plan"].starts
    torch.testing.assert_close(pipe(x), model(x))


def test_public_names() -> None:
    for name in names(README):
        if re.fullmatch(r"autopipe(\.\w+)+(\(.*\))?", name):
            assert pkgutil.resolve_name(name.partition("(")[0]) is not None
    assert "autopipe.profile.profile" in names(README)
    assert "autopipe.passes.devices" in names(README)
    assert {*autopipe.__all__} >= {"Pipeline", "Plan", "CostGraph", "compile", "plan", "simulate"}


def test_what_a_stage_has() -> None:
    """`pipe.stages[1].graph_module`, and the names that follow it in the README."""
    (line,) = re.findall(r"^- `pipe\.stages\[1\]\.(.*?)^- ", README, re.DOTALL | re.MULTILINE)
    shown = re.findall(r"`\.(\w+)`", line)
    assert shown
    pipe = autopipe.compile(Small(), ["cpu"] * 2, 2, args=(torch.zeros(4, 8),))
    for name in ("graph_module", *shown):
        assert isinstance(pipe.stages[1], StageView)
        getattr(pipe.stages[1], name)
    (boundary,) = pipe.stages[1].inputs
    assert isinstance(boundary, BoundaryTensor)
    for name in ("name", "shape", "dtype", "nbytes", "source", "targets"):
        getattr(boundary, name)


def test_a_schedule_on_paper() -> None:
    (call,) = re.findall(r"`autopipe\.(simulate\(.*?\))`", README)
    line = eval(re.sub("…", "1.0", call), {"simulate": autopipe.simulate})
    assert line.to_chrome_trace()


# --------------------------------------------------------------------------------------- commands

SOURCES = {
    "README": command_lines(README),
    "help": [line.strip() for line in EXAMPLES.splitlines()[1:]],
    "gpt2_xl.py": [
        line for line in XL.read_text(encoding="utf-8").splitlines() if line.startswith("autopipe ")
    ],
}


def test_every_source_of_commands_has_some() -> None:
    assert all(any(map(is_command, lines)) for lines in SOURCES.values())
    assert set(SOURCES) == {"README", "gpt2_xl.py", "help"}


def is_command(line: str) -> bool:
    return line.startswith("autopipe ")


def test_the_commands_are_some_and_the_page_of_tables_has_all() -> None:
    """(docs/tables.md is generated: test_generated.py.)"""
    shown = {line.split()[1] for line in SOURCES["README"] if is_command(line)}
    listed = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    known = {command.name for command in all_commands()}
    assert {"plan", "report", "simulate", "trace"} <= shown <= known
    assert all(f"| `autopipe {name}` |" in listed for name in known)
    assert "docs/tables.md" in README


@pytest.mark.full
@pytest.mark.parametrize(
    "source", ["README", "gpt2_xl.py", pytest.param("help", marks=pytest.mark.full)]
)
def test_the_commands_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
) -> None:
    """In the order in which they stand; each writes the file that it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "__autopipe_model__", raising=False)
    small = XL.read_text(encoding="utf-8")
    for large, less in (
        ("n_embd=1600, n_layer=48, n_head=25", "n_embd=1024, n_layer=8, n_head=16, vocab_size=64"),
        ("batch: int = 32, length: int = 1024", "batch: int = 2, length: int = 256"),
    ):
        assert small.count(large) == 1
        small = small.replace(large, less)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "gpt2_xl.py").write_text(small, encoding="utf-8")
    commands = [line for line in SOURCES[source] if is_command(line)]
    assert commands
    for line in commands:
        _, *arguments = shlex.split(line)
        if torch.cuda.is_available() and arguments[0] == "plan":  # a count means GPUs there
            arguments[arguments.index("--devices") + 1] = ",".join(["cpu"] * 8)
        assert main(arguments) == 0, line
        assert capsys.readouterr().out
        if "-o" in arguments:
            assert (tmp_path / arguments[arguments.index("-o") + 1]).stat().st_size > 1000, line


def test_other_commands_are_tested_elsewhere() -> None:
    """`make` (its targets: test_names.py); the demo: test_examples.py."""
    rest = [line for line in SOURCES["README"] if not is_command(line)]
    assert all(line.startswith("make ") for line in rest)


def test_python_m_autopipe_is_the_same_command() -> None:
    assert "`python -m autopipe`" in README
    done = subprocess.run(
        [sys.executable, "-m", "autopipe", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout.startswith("usage: autopipe")


@pytest.mark.full
def test_the_intermediate_programs_are_dumped(tmp_path: Path) -> None:
    """CONTRIBUTING's command with ``AUTOPIPE_DUMP``, for one step of training."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (line,) = [line for line in command_lines(text) if "AUTOPIPE_DUMP" in line]
    setting, program, script = line.split()
    assert program == "python"
    name, _, folder = setting.partition("=")
    subprocess.run(
        [sys.executable, str(ROOT / script), "--steps", "1"],
        cwd=tmp_path,
        check=True,
        timeout=300,
        capture_output=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", name: folder, "PATH": ""},
    )
    assert len([p for p in (tmp_path / folder).rglob("*") if p.is_file()]) >= 5
