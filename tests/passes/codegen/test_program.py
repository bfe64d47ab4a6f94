"""The generated program: what prints is what runs, and it says what it does.

Covers codegen/generated.py.

Golden files hold text that is ours to choose. `pytest tests/passes --golden` writes them anew.
"""

from __future__ import annotations

import ast
import dataclasses
import linecache
import random
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopipe.errors import StageError, VerifyError
from autopipe.passes.codegen import Generated, codegen
from autopipe.passes.ir.phased import Phased, StagePhases
from autopipe.passes.schedule.build import schedule
from autopipe.passes.schedule.kinds import KINDS
from autopipe.report import plan_text
from autopipe.report.columns import STAGE_COLUMNS
from autopipe.runtime.executor import Run
from autopipe.runtime.load import load_source
from autopipe.runtime.random import MicroBatchContext
from tests.golden.mlp import Mlp
from tests.support import hostile
from tests.support.agreement import pipelined
from tests.support.programs import CPU, phased_of, split_of, user_line

Golden = Callable[[str, str], None]

written_with_torch = pytest.mark.skipif(
    not torch.__version__.startswith("2.13"),
    reason="the golden program holds the ATen calls of torch 2.13",
)


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Lookup(nn.Module):
    """Fails at run time where an index is out of range, which no shape tells."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(6, 6), nn.Embedding(10, 6)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = x * 2
        return x + self.table(ids)  # the line that fails


def failing(chunks: int = 3) -> tuple[Any, StageError]:
    """A pipeline whose second stage has failed in its last micro-batch, and the error."""
    pipe = pipelined(Lookup(), chunks=chunks)
    x, ids = torch.randn(6, 6), torch.zeros(6, dtype=torch.long)
    pipe(x, ids)
    ids[-1] = 10
    with pytest.raises(StageError) as caught:
        pipe(x, ids)
    return pipe, caught.value


# ------------------------------------------------------------------------------- golden files


@written_with_torch
def test_golden_program(golden: Golden) -> None:
    pipe = pipelined(Mlp(), chunks=2, batch_norm="micro")
    pipe(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))
    golden("program", pipe.code)


@written_with_torch
def test_golden_program_for_inference(golden: Golden) -> None:
    pipe = pipelined(Mlp().eval(), chunks=2, batch_norm="micro")
    with torch.no_grad():
        pipe(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))
    golden("program_inference", pipe.code)


def test_golden_schedules(golden: Golden) -> None:
    tables = [
        schedule("gpipe", 4, 6),
        schedule("gpipe", 2, 3, backward=False),
        schedule("1f1b", 4, 6),
        schedule("1f1b", 3, 2),
    ]
    golden("schedules", "\n\n".join(map(str, tables)))


EXPLAINED = ["stage", "device", "calls", "parameters", "flops", "load", "sends", "saves", "memory"]
"""The columns in tests/golden/explain.txt; the table of stages may have more."""


def test_golden_explain(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tuple(c for c in STAGE_COLUMNS if c.heading in EXPLAINED)
    monkeypatch.setattr(plan_text, "STAGE_COLUMNS", known)
    pipe = pipelined(Mlp(), batch_norm="micro")
    pipe(torch.randn(7, 4), torch.zeros(7, dtype=torch.long))
    golden("explain", pipe.explain())


class Three(nn.Module):
    """The model in the docstring of `StagePhases`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.c(torch.relu(self.b(torch.tanh(self.a(x))))), y)


def test_stage_types_show_the_functions_that_are_written() -> None:
    """First, middle and last stage, with their arguments and results."""
    pipe = pipelined(Three(), devices=3, chunks=2)
    pipe(torch.randn(8, 4), torch.randn(8, 4))
    written = [
        f"{name}(ctx, [{', '.join(e.id for e in f.body[0].targets[0].elts)}])"
        f" -> {ast.unparse(f.body[-1].value)}"
        for name, f in functions(pipe.code).items()
        if name.startswith(("F_", "R_", "BW_", "RBW_"))
    ]
    shown = re.findall(r"^ +(\w+_\d_b4\(.*)$", StagePhases.__doc__ or "", re.MULTILINE)
    assert shown == written
    assert len(shown) == 8


# ------------------------------------------------------------------------------- text that runs


def test_the_program_that_prints_is_the_one_that_runs() -> None:
    """Under the file name of a traceback's frames, linecache holds exactly `pipe.code`."""
    pipe, error = failing()
    frames = traceback.extract_tb(error.__cause__.__traceback__)  # type: ignore[union-attr]
    names = {f.filename for f in frames if f.filename.startswith("<autopipe")}
    assert len(names) == 1
    assert "".join(linecache.getlines(names.pop())) == pipe.code


def test_a_traceback_shows_the_generated_line() -> None:
    pipe, error = failing()
    text = "".join(traceback.format_exception(error.__cause__))  # type: ignore[arg-type]
    (line,) = {x.strip() for x in pipe.code.splitlines() if "aten.embedding.default" in x}
    assert line.partition("  #")[0] in text
    assert "in forward_1" in text
    assert "in device_1_forward" in text


def test_an_error_names_stage_micro_batch_node_and_source() -> None:
    pipe, error = failing()
    assert (error.stage, error.microbatch, error.phase) == (1, 2, "F")
    assert re.search(rf"^    {error.node}: .* = torch.ops.aten.embedding", pipe.code, re.MULTILINE)
    assert error.source == user_line(Lookup.forward, "# the line " + "that fails")
    assert isinstance(error.__cause__, IndexError)
    assert str(error).startswith("stage 1, micro-batch 2 failed: IndexError: index out of range")


def test_the_same_model_gives_the_same_text() -> None:
    codes = []
    for _ in range(2):
        pipe = pipelined(Mlp())
        pipe(torch.randn(7, 4), torch.zeros(7, dtype=torch.long))
        codes.append(pipe.code)
    assert codes[0] == codes[1]


@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.full)])
def test_names_of_values_and_schedules_of_any_text(count: int) -> None:
    """They stand in literals: between stages, for buffers and parameters, and in the title."""
    model, x = Layers(2), torch.randn(4, 6)
    phased = phased_of(split_of(model, 2, x), model, 4, ((x,), {}))
    rng = random.Random(3)
    with hostile.nothing_runs():
        for _ in range(count):
            names = dict.fromkeys(phased.split.routes, "")
            names |= {n: "" for stage in phased.stages for n in stage.own_grads}
            names = {n: f"{i}{hostile.text(rng)}" for i, n in enumerate(names)}
            # Python 3.13 compiles no docstring with a lone surrogate.
            kind = hostile.text(rng).encode(errors="backslashreplace").decode()
            plan = dataclasses.replace(schedule("gpipe", 2, 1), kind=kind)
            source = codegen(plan, {4: renamed(phased, names)}, [4], [CPU, CPU]).source
            assert set(names.values()) <= {s.removeprefix("grad ") for s in strings(source)}
            assert (ast.get_docstring(ast.parse(source), clean=False) or "").startswith(plan.kind)
            load_source(source)


def renamed(phased: Phased, names: dict[str, str]) -> Phased:
    """A program whose values have other names."""
    routes = {
        names[n]: dataclasses.replace(r, spec=dataclasses.replace(r.spec, name=names[n]))
        for n, r in phased.split.routes.items()
    }
    fields = ("receives", "tangents", "returns", "updates", "own_grads", "sent_grads")
    stages = tuple(
        dataclasses.replace(s, **{f: tuple(names[n] for n in getattr(s, f)) for f in fields})
        for s in phased.stages
    )
    split = dataclasses.replace(phased.split, routes=routes)
    return dataclasses.replace(phased, split=split, stages=stages)


def strings(source: str) -> set[str]:
    """The texts in a program."""
    constants = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)]
    return {c for c in constants if isinstance(c, str)}


# ------------------------------------------------------------------------------- what it is made of


def program(*, chunks: int = 3, grad: bool = True) -> str:
    pipe = pipelined(Mlp(), chunks=chunks, batch_norm="micro")
    with torch.set_grad_enabled(grad):
        pipe(torch.randn(7, 4), torch.zeros(7, dtype=torch.long))
    return str(pipe.code)


def functions(source: str) -> dict[str, ast.FunctionDef]:
    return {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}


def test_the_text_needs_torch_and_a_run_only() -> None:
    tree = ast.parse(program())
    imported = {
        getattr(n, "module", None) or n.names[0].name
        for n in ast.walk(tree)
        if isinstance(n, (ast.Import, ast.ImportFrom))
    }
    assert imported == {"math", "torch"}


def test_it_calls_methods_of_run_and_of_ctx() -> None:
    words: dict[str, set[str]] = {"run": set(), "ctx": set()}
    for n in ast.walk(ast.parse(program())):
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in words:
            words[n.value.id].add(n.attr)
    assert words["run"] == {
        "state",
        "context",
        "receive",
        "send",
        "return_to_caller",
        "update_buffer",
        "save",
        "pop_saved",
    }
    assert all(callable(getattr(Run, w)) for w in words["run"])
    assert words["ctx"] == {"draw", "accumulate"}
    assert all(callable(getattr(MicroBatchContext, w)) for w in words["ctx"])


def test_devices_run_their_list_of_actions() -> None:
    """device_k_way calls each action's function, in the order of the schedule.

    Device 0 waits for gradients, and recomputes meanwhile.
    """
    made = functions(program())
    backwards = {0: (("recompute", "R"), ("backward", "BW")), 1: (("backward", "RBW"),)}
    for device in (0, 1):
        for way, actions in (("forward", (("forward", "F"),)), ("backward", backwards[device])):
            lines = [ast.unparse(s) for s in made[f"device_{device}_{way}"].body]
            assert lines == [
                f"{verb}_{device}(run, {m}, {phase}_{device}_b{size})"
                for m, size in enumerate((3, 2, 2))
                for verb, phase in actions
            ]


def test_inference_has_no_backward() -> None:
    made = functions(program(grad=False))
    assert not [n for n in made if "backward" in n or n.startswith(("R", "B", "W"))]
    assert "run.keep" not in program(grad=False)


def test_identical_stages_share_their_functions() -> None:
    pipe = pipelined(Layers(5), devices=5, chunks=2)
    pipe(torch.randn(4, 6)).sum().backward()
    made = functions(pipe.code)
    assert sorted(n for n in made if n.startswith(("F", "R", "BW"))) == [
        *("BW_0_b2", "BW_1_b2"),
        *("F_0_b2", "F_1_b2"),
        *("RBW_4_b2", "R_0_b2", "R_1_b2"),  # the last stage does not wait
    ]
    assert {f"forward_{k}" for k in range(5)} <= made.keys()


def test_functions_take_their_arguments_out_of_the_list() -> None:
    """So that nothing but the function keeps them alive; and they compute what the graph says."""
    model, x = Layers(2), torch.randn(4, 6)
    cut = split_of(model, 2, x)
    phased = phased_of(cut, model, 4, ((x,), {}))
    source = codegen(schedule("gpipe", 2, 1), {4: phased}, [4], [CPU, CPU]).source
    names, _ = load_source(source)
    held = [p.detach() for p in model.layers[0].parameters()]
    arguments = [*held, x]
    with torch.no_grad():
        (expected,) = cut.stages[0].graph_module(*arguments)
        result, kept = names["F_0_b4"](MicroBatchContext(0, (), 0), arguments)
    assert arguments == []
    assert torch.equal(result, expected)
    assert kept is x


def test_values_are_let_go_after_their_last_use() -> None:
    """Every value but the results is set to None in the line that uses it last."""
    for name, function in functions(program()).items():
        if not name.startswith(("F_", "RBW_")):
            continue
        *body, last = function.body
        assert isinstance(last, ast.Return)
        returned = {n.id for n in ast.walk(last) if isinstance(n, ast.Name)}
        made, dropped, used = set(), set(), set()
        for n in body[2:]:
            if isinstance(n, ast.Assign) and ast.unparse(n.value) == "None":
                dropped |= {t.id for t in n.targets if isinstance(t, ast.Name)}
                continue
            target = n.targets[0] if isinstance(n, ast.Assign) else getattr(n, "target", None)
            assert isinstance(target, ast.Name)
            made.add(target.id)
            value = n.value  # type: ignore[attr-defined]
            used |= {x.id for x in ast.walk(value) if isinstance(x, ast.Name)} - {"torch", "device"}
        assert made - returned <= dropped
        assert used - returned <= dropped


def test_stages_traced_for_one_device_run_on_another() -> None:
    class Makes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(x.shape[0], 6)

    model, x = Makes(), torch.randn(4, 6)
    phased = phased_of(split_of(model, 1, x), model, 4, ((x,), {}), grad=False)
    plan = schedule("gpipe", 1, 1, backward=False)
    here = codegen(plan, {4: phased}, [4], [CPU]).source
    there = codegen(plan, {4: phased}, [4], [torch.device("cuda", 3)]).source
    assert "device(type='cpu')" in here
    assert "device(type='cuda', index=3)" in there
    assert "device(type='cpu')" not in there


def test_constants_that_are_no_numbers_of_python() -> None:
    class Constants(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.masked_fill(x > 0, float("-inf")).clamp(max=float("inf"))
            return torch.nan_to_num(F.pad(y, (1, 1), value=float("nan")), neginf=-1e30).double()

    pipe = pipelined(Constants())
    x = torch.randn(7, 6)
    assert torch.equal(pipe(x), Constants()(x))
    assert "inf" in pipe.code
    assert "torch.float64" in pipe.code


# ------------------------------------------------------------------------------- rules, dumps


VERBS = {"F": "forward", "RBW": "backward", "BW": "backward", "R": "recompute"}
VERBS |= {"RB": "gradients", "B": "gradients", "W": "weights"}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [1, 2])
def test_devices_run_their_actions_in_the_order_of_the_schedule(
    kind: str, K: int, early: bool
) -> None:
    planned = schedule(kind, K, 3, early_recompute=early)
    model, x = Layers(4), torch.randn(6, 6)
    phased = phased_of(split_of(model, planned.stages, x), model, 2, ((x,), {}))
    found = codegen(planned, {2: phased}, [2] * 3, [CPU] * planned.stages)
    made = functions(found.source)
    names = [found.step] if found.step else [found.forward, found.backward]
    for k, row in enumerate(planned.devices):
        written = [ast.unparse(s) for each in names for s in made[each[k]].body]
        expected = [f"{VERBS[a.phase]}_{a.stage}(run, {a.microbatch}, {a.phase}_" for a in row]
        assert [line[: len(e)] for line, e in zip(written, expected, strict=True)] == expected
    assert bool(found.step) == (planned != planned.forwards_first())


def test_a_device_without_its_backwards_is_not_written() -> None:
    planned = schedule("gpipe", 2, 2)
    first, second = planned.devices
    model, x = Layers(2), torch.randn(4, 6)
    phased = phased_of(split_of(model, 2, x), model, 2, ((x,), {}))
    missing = dataclasses.replace(planned, devices=(first, second[:2]))
    with pytest.raises(VerifyError, match=r"B1\.0 is not scheduled"):
        codegen(missing, {2: phased}, [2, 2], [CPU, CPU])


@pytest.mark.parametrize("backward", [True, False])
def test_forwards_in_another_order_are_not_written(backward: bool) -> None:
    """A buffer's update would go from micro-batch 1 to micro-batch 0."""
    planned = schedule("gpipe", 1, 2, backward=backward)
    (row,) = planned.devices
    swapped = dataclasses.replace(planned, devices=((row[1], row[0], *row[2:]),))
    swapped.verify()
    model, x = Layers(1), torch.randn(4, 6)
    phased = phased_of(split_of(model, 1, x), model, 2, ((x,), {}), grad=backward)
    with pytest.raises(VerifyError, match="cannot be executed: device 0") as caught:
        codegen(swapped, {2: phased}, [2, 2], [CPU])
    assert caught.value.found == "1, 0"


def test_generated_text_without_a_device_program() -> None:
    text = "def device_0_forward(run):\n    device_0_forward(run)\n"
    sound = Generated(text, ("device_0_forward",), ())
    sound.verify()
    for broken in (
        dataclasses.replace(sound, source=""),
        dataclasses.replace(sound, forward=("device_0_forward", "device_1_forward")),
        dataclasses.replace(sound, backward=("device_0_backward",)),
    ):
        with pytest.raises(VerifyError, match="a device without a function") as caught:
            broken.verify()
        assert "device_" in str(caught.value)
    with pytest.raises(VerifyError, match="no Python"):
        dataclasses.replace(sound, source="def device_0_forward(run:").verify()
    assert str(sound) == sound.source


def test_every_program_is_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPIPE_DUMP", str(tmp_path / "dump"))
    pipe = pipelined(Mlp())
    pipe(torch.randn(7, 4), torch.zeros(7, dtype=torch.long))
    files = sorted((tmp_path / "dump").iterdir())
    assert [f.name.split("-")[1] for f in files] == [
        "captured.txt",
        "annotated.txt",
        "split.txt",
        "phased.txt",  # micro-batches of three,
        "phased.txt",  # and of two
        "scheduled.txt",
        "generated.py",
    ]
    assert files[-1].read_text().rstrip() == pipe.code.rstrip()
    assert files[0].read_text().rstrip() == str(pipe.captured).rstrip()
    assert all(f.stat().st_size > 100 for f in files)
