"""Command lines for the tests of commands, and models for them to plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from autopipe.cli import main

ROOT = Path(__file__).parents[2]

MODELS = """
import torch
from torch import nn

class Coupled(nn.Module):
    def forward(self, x):
        return x.softmax(0)

class Net(nn.Sequential):
    def forward(self, x, scale=None):
        y = super().forward(x)
        return y if scale is None else y * scale

def layers():
    return Net(*(nn.Linear(6, 6) for _ in range(4)))

def x():
    return torch.zeros(8, 6)

def with_args(): return layers(), (x(),)
def with_kwargs(): return layers(), {"x": x()}
def with_both(): return layers(), (x(),), {"scale": x()}
def coupled(): return Coupled(), (x(),)
def alone(): return layers()
def tied():
    model = layers()
    model[3] = model[0]
    return model, (x(),)
def bare(): return layers(), x()
def fails(): return {}["no such key"]
def device():
    print("made on", x().device)
    return with_args()

class Holder:
    @staticmethod
    def make(): return with_args()
    number = 3
"""


def planning(target: str, *more: str) -> list[str]:
    return ["plan", target, "--devices", "cpu,cpu", "--chunks", "4", *more]


def simulated(text: str) -> list[str]:
    return ["simulate", "--forward=1", "--backward=1", *text.split()]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "autopipe", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd or ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def assert_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    """The arguments end in exit code 2 and a message that has `words` in it, and nothing else."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("autopipe: ")
    assert words in captured.err
    assert "Traceback" not in captured.err
