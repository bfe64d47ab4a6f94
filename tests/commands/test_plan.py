"""``autopipe plan``: what it prints and saves, and how it fails. (And `target`.)

Covers target.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import autopipe
from autopipe import Plan
from autopipe.cli import main
from autopipe.errors import MemoryLimitError
from autopipe.target import load
from tests.support.command_line import MODELS, ROOT, assert_refused, planning


@pytest.mark.parametrize(
    "target",
    [
        *("models.py:with_args", "models.py:with_kwargs", "models.py:with_both"),
        *("models:with_args", "models:Holder.make"),
    ],
)
def test_plan_prints_the_table_and_saves(
    models: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    assert main(planning(target, "-o", "plan.json")) == 0
    saved = Plan.load(models / "plan.json")
    captured = capsys.readouterr()
    assert captured.out == f"{saved}\n"
    assert captured.err == ""
    assert (len(saved.stages), saved.sizes, saved.remat) == (2, (2, 2, 2, 2), "full")
    assert [s.parameter_bytes for s in saved.stages] == [2 * 4 * 42] * 2


def test_it_is_the_plan_of_the_function(models: Path) -> None:
    options = ["--remat", "none", "--batch-norm", "micro", "-o", "plan.json"]
    assert main(planning("models.py:with_args", *options)) == 0
    scope: dict[str, object] = {}
    exec(MODELS, scope)
    model, args = scope["with_args"]()  # type: ignore[operator]
    plan = autopipe.plan(model, ["cpu"] * 2, 4, args=args, remat="none", batch_norm="micro")
    assert Plan.load("plan.json") == plan


def test_sums_of_shared_parameters(models: Path) -> None:
    scope: dict[str, object] = {}
    exec(MODELS, scope)
    plans = {}
    for exact, options in ((True, ()), (False, ("--no-exact",))):
        assert main(planning("models.py:tied", *options, "-o", "plan.json")) == 0
        model, args = scope["tied"]()  # type: ignore[operator]
        plans[exact] = autopipe.plan(model, ["cpu"] * 2, 4, args=args, exact=exact)
        assert Plan.load("plan.json") == plans[exact]
    assert plans[True] != plans[False]  # without exact less is sent


def test_a_count_of_devices(models: Path) -> None:
    if torch.cuda.device_count() == 1:
        pytest.skip("a count of two needs no GPU, or two")
    assert main(["plan", "models.py:with_args", "--devices=2", "--chunks=3", "-o", "p.json"]) == 0
    assert Plan.load("p.json").sizes == (3, 3, 2)


@pytest.mark.parametrize(("more", "device"), [([], "meta"), (["--real"], "cpu")])
def test_it_is_called_under_the_meta_device(
    models: Path, capsys: pytest.CaptureFixture[str], more: list[str], device: str
) -> None:
    assert main(planning("models.py:device", *more)) == 0
    assert capsys.readouterr().out.startswith(f"made on {device}\n2 stages")


@pytest.mark.full
def test_the_readmes_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 XL on 8 devices: 1,557,611,200 parameters, the published size, and its page."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "plan.json"
    target = f"{ROOT / 'examples' / 'gpt2_xl.py'}:training"
    devices = ",".join(["cpu"] * 8)
    assert main(["plan", target, "--devices", devices, "--chunks", "16", "-o", str(path)]) == 0
    plan = Plan.load(path)
    assert sum(s.parameter_bytes for s in plan.stages) == 4 * 1_557_611_200
    assert main(["report", str(path)]) == 0
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "GPT2LMHeadModel in 8 stages" in page
    assert len(page) < 300_000
    capsys.readouterr()


WRONG = {
    "no colon": (planning("models.py"), "no callable is named"),
    "no file": (planning("other.py:make"), "there is no such file"),
    "no module": (planning("no_such.module:make"), "there is no module 'no_such.module'"),
    "no submodule": (planning("json.nothing:make"), "there is no module 'json.nothing'"),
    "no callable": (planning("models.py:nothing"), "models.py has no 'nothing'"),
    "not callable": (planning("models.py:Holder.number"), "cannot be called"),
    "no inputs": (planning("models.py:alone"), "found: Net"),
    "a bare tensor": (planning("models.py:bare"), "found: Net, Tensor"),
    "devices": (planning("models.py:with_args", "--devices", "0"), "at least 1"),
    "a device": (planning("models.py:with_args", "--devices", "tpu0"), "no such device"),
    "an index": (planning("models.py:with_args", "--devices", "998,999"), "no GPU with this index"),
    "remat": (planning("models.py:with_args", "--remat", "some"), "unknown remat"),
    "schedule": (planning("models.py:with_args", "--schedule", "fifo"), "unknown schedule"),
    "stages per device": (
        planning("models.py:with_args", "--virtual-stages", "2"),
        "virtual_stages",
    ),
    "memory": (planning("models.py:with_args", "--memory", "much"), "16GiB"),
    "device": (planning("models.py:with_args", "--device", "tpu"), "no such device"),
    "output": (planning("models.py:with_args", "-o", "none/plan.json"), "cannot be written"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_code_2(
    models: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    assert_refused(capsys, *WRONG[case])


def test_a_memory_limit_that_nothing_keeps_is_code_1(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(planning("models.py:with_args", "--memory", "500B")) == 1
    model, args, kwargs = load(f"{models / 'models.py'}:with_args")
    with pytest.raises(MemoryLimitError) as caught:
        autopipe.plan(model, ["cpu"] * 2, 4, args=args, kwargs=kwargs, memory="500B")
    assert capsys.readouterr().err == f"autopipe: {caught.value}\n"


@pytest.mark.parametrize(
    ("target", "more", "words"),
    [("coupled", [], "softmax"), ("with_args", ["--devices", "cpu," * 8 + "cpu"], "9 stages")],
)
def test_a_model_that_cannot_be_planned_is_code_1(
    models: Path, capsys: pytest.CaptureFixture[str], target: str, more: list[str], words: str
) -> None:
    assert main(planning(f"models.py:{target}", "--real", *more)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
