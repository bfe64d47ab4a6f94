"""The examples run, say what they promise to say, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.documents import blocks, stage_columns

ROOT = Path(__file__).parents[2]

PROGRESS = r"autopipe: (.+ \(step \d+, after \d+ s\)|compiled in [\d.]+ s)$"
"""A line of progress, which a slow machine shows."""

EXAMPLES: dict[str, tuple[list[str], list[str]]] = {
    "quickstart": (
        ["--steps", "3"],
        [
            "2 stages, 4 micro-batches of 8, schedule gpipe, remat full",
            "p_transformer_wte_weight: float32[256, 256] stage 0 -> stage 1",
            "def forward_1(run, m, compute):",
            "step   2   loss",
            "largest difference in the first 3 losses:",
        ],
    ),
    "quickstart, other options": (
        ["--steps", "2", "--devices", "3", "--chunks", "5", "--remat", "min-cut"],
        ["3 stages, 5 micro-batches of 7 or 6, schedule gpipe, remat min-cut", "def forward_2("],
    ),
    "inspect_stages": (
        [],
        [
            "in   input_ids: int64[B, 32] caller -> stage 0",
            "forward flops       6815744*B",
            "torch.ops.aten.",
            "4 stages, 8 micro-batches of 4",
            "device 3",
        ],
    ),
    "unet_skips": (
        ["--steps", "2"],
        ["stage 0 -> stage 3   (not through [1, 2])", "largest gradient", "step  1   loss"],
    ),
    "encoder_decoder": (
        ["--steps", "2"],
        [
            "stage 2 receives  labels: int64[B, 10]",
            "words in micro-batches [3, 3, 2, 2]",
            "step  1   loss",
        ],
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    options, lines = EXAMPLES[name]
    path = ROOT / "examples" / f"{name.partition(',')[0]}.py"
    done = subprocess.run(
        [sys.executable, path, *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    for line in lines:
        assert line in done.stdout
    said = [line for line in done.stderr.splitlines() if not re.match(PROGRESS, line)]
    assert said == []
    if name == "quickstart" and torch.__version__.startswith("2.13"):  # the README's, by this demo
        (shown,) = [
            b
            for b in blocks((ROOT / "README.md").read_text("utf-8"), "text")
            if "schedule gpipe" in b
        ]
        assert stage_columns(shown).items() <= stage_columns(done.stdout).items()


LIBRARIES: dict[str, tuple[str, list[str]]] = {
    "trainer": ("transformers", ["the saved model has the trained weights: True"]),
    "accelerate_loop": ("accelerate", ["unwrapped, it is the model: True"]),
    "lightning_fit": ("lightning", ["names of weights: body.transformer.wte.weight, ..."]),
    "peft_lora": ("peft", ["the saved adapter gives the same loss: True"]),
}


@pytest.mark.parametrize(
    "name", ["trainer", *(pytest.param(n, marks=pytest.mark.full) for n in [*LIBRARIES][1:])]
)
def test_example_with_a_library(name: str) -> None:
    """It trains: the loss falls. (Against the plain model: test_trainers*.py.)"""
    package, lines = LIBRARIES[name]
    pytest.importorskip(package, reason=f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", "--steps", "6"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    ((first, last),) = re.findall(r"^loss (\d+\.\d+) -> (\d+\.\d+)$", done.stdout, re.MULTILINE)
    assert float(last) < float(first) - 0.1
    assert "stages: 2" in done.stdout
    assert all(line in done.stdout.splitlines() for line in lines)


def test_every_example_is_tested() -> None:
    tested = {name.partition(",")[0] for name in EXAMPLES} | {*LIBRARIES}
    planned = {"gpt2_xl"}  # by commands, in test_readme.py and test_plan.py
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == tested | planned
