"""The command: what it prints and writes, its exit codes, and what it does not import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import autopipe
from autopipe import Plan, simulate
from autopipe.cli import main
from autopipe.errors import MemoryLimitError, UnsupportedError
from autopipe.target import load
from tests.support.plans import made_plan

ROOT = Path(__file__).parents[1]

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


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models.py, which is the working directory; sys.path is put back."""
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for name in ("models", "__autopipe_model__"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def planning(target: str, *more: str) -> list[str]:
    return ["plan", target, "--devices", "cpu,cpu", "--chunks", "4", *more]


def simulated(text: str) -> list[str]:
    return ["simulate", "--forward=1", "--backward=1", *text.split()]


# ------------------------------------------------------------------------------------------ plan


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


@pytest.mark.slow
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
    "remat": (planning("models.py:with_args", "--remat", "some"), "unknown remat"),
    "schedule": (planning("models.py:with_args", "--schedule", "zb-v"), "does not execute"),
    "memory": (planning("models.py:with_args", "--memory", "much"), "16GiB"),
    "device": (planning("models.py:with_args", "--device", "tpu"), "no such device"),
    "output": (planning("models.py:with_args", "-o", "none/plan.json"), "cannot be written"),
    "no plan": (["report", "none.json"], "none.json: No such file"),
    "a folder": (["report", "."], "cannot be"),
    "not a plan": (["report", "models.py"], "not a plan"),
    "trace of no plan": (["trace", "models.py"], "not a plan"),
    "kind": (simulated("other --stages 2 --chunks 2"), "unknown schedule"),
    "stages": (simulated("gpipe --stages 0 --chunks 2"), "stages >= 1"),
    "times": (simulated("gpipe --stages 2 --chunks 2 --weight 1,2,3"), "`weight`"),
    "negative": (simulated("gpipe --stages 2 --chunks 2 --transfer -1"), "`transfer`"),
    "endless": (simulated("gpipe --stages 2 --chunks 2 --weight inf"), "`weight`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_and_files_are_code_2(
    models: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, words = WRONG[case]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("autopipe: ")
    assert words in captured.err
    assert "Traceback" not in captured.err


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


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "autopipe", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd or ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_the_users_own_exception_has_its_traceback(models: Path) -> None:
    done = run(*planning("models.py:fails"), cwd=models)
    assert done.returncode == 1
    assert ", in fails\n" in done.stderr
    assert done.stderr.endswith("KeyError: 'no such key'\n")
    (models / "broken").mkdir()
    (models / "broken" / "__init__.py").write_text("import no_such_package\n")
    for target in ("broken:make", "broken.models:make", "broken/__init__.py:make"):
        done = run(*planning(target), cwd=models)
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert done.stderr.endswith("No module named 'no_such_package'\n")


# -------------------------------------------------------------------------------------- simulate


def test_simulate_prints_the_chart_and_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    times = "--forward 18.5 --backward 18.1 --weight 9.3 --recompute 1 --transfer 0.6"
    assert main(simulated(f"1f1b --stages 8 --chunks 24 {times}")) == 0
    lines = capsys.readouterr().out.splitlines()
    line = simulate(
        "1f1b", stages=8, chunks=24, forward=18.5, backward=18.1, weight=9.3, recompute=1.0,
        transfer=0.6,
    )  # fmt: skip
    assert lines[:9] == str(line).splitlines()
    work = 8 * 24 * (18.5 + 18.1 + 9.3 + 1)
    assert lines[9:] == [
        f"work {work:.6g}, busiest device {work / 8:.6g}",
        f"speed-up over one device {work / line.makespan:.3f}, of 8 at best",
    ]


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ("gpipe --early-recompute", {"early_recompute": True}),
        ("interleaved --virtual-stages 3", {"virtual_stages": 3}),
        ("zb-v --weight 1", {"weight": 1.0}),
    ],
)
def test_what_other_schedules_are_told(
    capsys: pytest.CaptureFixture[str], options: str, facts: dict[str, Any]
) -> None:
    assert main(simulated(f"{options} --stages 4 --chunks 8 --recompute 1")) == 0
    line = simulate(
        options.split()[0], stages=4, chunks=8, forward=1.0, backward=1.0, recompute=1.0, **facts
    )
    assert capsys.readouterr().out.startswith(f"{line}\nwork ")


def test_who_reads_may_stop_reading() -> None:
    command = [sys.executable, "-m", "autopipe", *simulated("gpipe --stages 2 --chunks 2")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(60) == 0


def test_gpipes_speedup_is_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    """KM/(M + K - 1) for equal stages; the time of each may be given."""
    assert main(simulated("gpipe --stages 4 --chunks 32 --forward 1,1,1,1 --backward 2")) == 0
    assert f"speed-up over one device {4 * 32 / 35:.3f}, of 4" in capsys.readouterr().out


@pytest.mark.parametrize("bad", ["--forward one", "--forward 1,,2", "--chunks 2.5", "--transfer x"])
def test_what_is_no_number_is_argparses_error(capsys: pytest.CaptureFixture[str], bad: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(simulated(f"gpipe --stages 2 --chunks 2 --forward 1 --backward 1 {bad}"))
    assert caught.value.code == 2
    assert "invalid" in capsys.readouterr().err


# --------------------------------------------------------------------------------- report, trace


@pytest.mark.parametrize(
    ("command", "given", "written"),
    [
        ("report", [], "plan.html"),
        ("report", ["-o", "page.html"], "page.html"),
        ("trace", [], "plan.trace.json"),
        ("trace", ["-o", "t.json"], "t.json"),
    ],
)
def test_pages_and_traces_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, given: list[str], written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    made_plan().save("plan.json")
    assert main([command, "plan.json", *given]) == 0
    text = Path(written).read_text(encoding="utf-8")
    if command == "report":
        assert re.search(r"^<!DOCTYPE html>\n<html lang=\"en\">.*</html>\n$", text, re.DOTALL)
    else:
        assert len([e for e in json.loads(text)["traceEvents"] if e["ph"] == "X"]) == 18


@pytest.mark.parametrize("command", ["report", "trace"])
def test_the_plan_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = tmp_path / "plan.json"
    made_plan().save(path)
    before = path.read_bytes()
    assert main([command, str(path), "-o", str(path)]) == 2
    assert path.read_bytes() == before
    assert "would replace the plan" in capsys.readouterr().err


def test_a_plan_that_cannot_be_simulated_is_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def timeline(plan: Plan) -> None:
        raise UnsupportedError(f"schedule {plan.schedule!r} is not simulated")

    path = tmp_path / "plan.json"
    made_plan().save(path)
    monkeypatch.setattr(Plan, "timeline", property(timeline))
    for command in ("report", "trace"):
        assert main([command, str(path)]) == 2
        assert "'gpipe' is not simulated" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that cannot be written")
def test_what_cannot_be_written_is_a_message(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_plan().save("plan.json")
    for arguments in (planning("models.py:with_args"), ["report", "plan.json"]):
        assert main([*arguments, "-o", "/dev/full"]) == 2
        assert "the output cannot be written" in capsys.readouterr().err


def test_python_m_autopipe_is_the_command() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: autopipe")
    assert run().returncode == 2
