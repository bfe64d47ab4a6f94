"""`Plan`: printed, saved, read back, refused, and used by `compile`.

Covers planning/plan_data.py, planning/plan_parts.py and typed_json.py.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import autopipe
from autopipe import Plan
from autopipe.errors import AutopipeError, OptionError, PlanError, VerifyError
from autopipe.passes.remat_policies import policy_options
from autopipe.passes.schedule.kinds import KINDS
from autopipe.planning.plans import VERSION
from tests.support.agreement import assert_agrees

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("alike_models_once")]

X = torch.randn(7, 6, dtype=torch.float64)


class Net(nn.Module):
    """Layers with a skip from the first to the last, dropouts between, and two results."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = h = self.layers[0](x)
        for layer in self.layers[1:]:
            h = torch.nn.functional.dropout(torch.tanh(layer(h)), 0.0, self.training)
        return h + first, h.mean()


@pytest.fixture(scope="module")
def plan() -> Plan:
    return autopipe.plan(Net(), ["cpu"] * 3, 3, args=(X,))


@pytest.fixture
def path(tmp_path: Path, plan: Plan) -> Path:
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_step_ends_when_results_have_been_put_together(plan: Plan) -> None:
    """By hand: of 7 × 6 doubles each is read and written once; a mean is no copy."""
    speed, start = 0.5 * 40e9, 2e-6  # of the table's CPU core
    assert plan.gather_seconds == pytest.approx(2 * 7 * 6 * 8 / speed + start)
    assert plan.step_seconds == plan.timeline.makespan + plan.gather_seconds
    assert "to gather results" in str(plan)
    whole = autopipe.plan(Net(), ["cpu"] * 3, 1, args=(X,))
    assert whole.gather_seconds == 0.0, "one micro-batch's results are the batch's"
    assert "gather" not in str(whole)


def test_what_is_saved_is_read_back(plan: Plan, path: Path) -> None:
    found = Plan.load(path)
    assert found == plan
    assert str(found) == str(plan)
    assert found.timeline.makespan == plan.timeline.makespan > 0


def test_the_file_is_plain_json_with_a_version(plan: Plan, path: Path) -> None:
    data = json.loads(path.read_text())
    assert (data["format"], data["version"]) == ("autopipe plan", VERSION)
    assert [s["first"] for s in data["plan"]["stages"]][1:] == list(plan.starts)


KEYS = {
    "plan": "model training whole graph schedule actions devices chunks sizes stages totals"
    " crossings begins repeated bound_seconds cut_seconds gather_seconds notes",
    "stage": "first modules calls device speeds remat parameters flops times parameter_bytes"
    " gradient_bytes optimizer_bytes buffer_bytes lent_bytes activation_bytes saved_bytes in_flight"
    " peak_saved_bytes peak_bytes limit_bytes offloaded_bytes kept_bytes",
    "times": "forward recompute backward weight receive give_back issue offload",
    "crossing": "name kind looks source targets returned nbytes gradient",
}


def test_the_keys_in_files(path: Path) -> None:
    """Fields may be renamed; the keys and their order in files may not."""
    plan = json.loads(path.read_text())["plan"]
    parts = {"plan": plan, "stage": plan["stages"][0], "crossing": plan["crossings"][0]}
    parts["times"] = parts["stage"]["times"][0]
    assert {name: " ".join(part) for name, part in parts.items()} == KEYS


def test_it_says_what_the_stages_are(plan: Plan) -> None:
    model = Net()
    assert [p for s in plan.stages for p in s.parameters] == [
        n for n, _ in model.named_parameters()
    ]
    assert sum(s.parameter_bytes for s in plan.stages) == sum(p.nbytes for p in model.parameters())
    assert sum(s.flops for s in plan.stages) == 6 * 2 * 3 * 6 * 6  # micro-batches of three
    skip = next(c for c in plan.crossings if c.kind == "activation" and 2 in c.targets)
    assert str(skip).endswith(f"stage {skip.source} -> stage 2") or len(skip.targets) == 2
    assert {c.nbytes for c in plan.crossings} == {3 * 6 * 8}


# ------------------------------------------------------------------------------- used by compile


def moved(plan: Plan) -> Plan:
    """The same with other cuts: one call later each."""
    pipe = autopipe.compile(Net(), ["cpu"] * 3, 3, args=(X,))
    names = [n.name for n in pipe.captured.graph_module.graph.nodes if n.op == "call_function"]
    stages = [plan.stages[0]]
    for stage in plan.stages[1:]:
        assert stage.first is not None
        first = names[names.index(stage.first) + 1]
        stages.append(dataclasses.replace(stage, first=first))
    return dataclasses.replace(plan, stages=tuple(stages))


@pytest.mark.parametrize("change", [lambda p: p, moved], ids=["its own cut", "another cut"])
def test_compile_cuts_as_planned(
    plan: Plan, tmp_path: Path, change: Callable[[Plan], Plan]
) -> None:
    planned = change(plan)
    planned.save(tmp_path / "plan.json")
    pipe = autopipe.compile(Net(), plan=tmp_path / "plan.json")
    assert_agrees(pipe, X)
    assert pipe.plan.starts == planned.starts
    assert pipe.plan.chunks == 3
    assert len(pipe.stages) == 3
    assert_agrees(pipe, X[:2])
    pipe.eval()
    assert_agrees(pipe, X)
    assert autopipe.compile(Net(), plan=planned, args=(X,)).plan.starts == planned.starts


def test_a_plan_made_without_weights_is_used_with_them() -> None:
    with torch.device("meta"):
        model = Net()
    plan = autopipe.plan(model, ["cpu"] * 2, 3, args=(X.to("meta"),))
    pipe = autopipe.compile(Net(), plan=plan)
    assert_agrees(pipe, X)
    assert pipe.plan.starts == plan.starts


def test_the_plan_of_a_pipeline_is_that_of_its_model(plan: Plan) -> None:
    assert autopipe.compile(Net(), ["cpu"] * 3, 3, args=(X,)).plan == plan


def test_in_the_other_mode_calls_may_differ() -> None:
    """A stage that starts at a dropout starts elsewhere in evaluation, where there is none."""

    class Dropped(Net):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            h = self.layers[0](x)
            return self.layers[1](torch.nn.functional.dropout(h, 0.5, self.training))

    plan = autopipe.plan(Dropped(), ["cpu"] * 2, 3, args=(X,))
    stages = (plan.stages[0], dataclasses.replace(plan.stages[1], first="dropout"))
    pipe = autopipe.compile(Dropped(), plan=dataclasses.replace(plan, stages=stages))
    pipe(X)
    assert pipe.plan.starts == ("dropout",)
    pipe.eval()
    assert_agrees(pipe, X)


@pytest.mark.parametrize(
    "wrong", [{"devices": 2}, {"devices": ["cpu"] * 4}, {"chunks": 4}, {"remat": "none"}]
)
def test_what_contradicts_the_plan_is_refused(plan: Plan, wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(wrong))} is not the plan's"):
        autopipe.compile(Net(), plan=plan, **wrong)
    autopipe.compile(Net(), ["cpu"] * 3, 3, remat="full", schedule="gpipe", plan=plan)


def test_without_plan_devices_are_needed() -> None:
    with pytest.raises(OptionError, match="needs devices"):
        autopipe.compile(Net(), chunks=2)


def test_the_plan_of_another_model_is_refused(plan: Plan) -> None:
    with pytest.raises(PlanError, match="not one for this model") as caught:
        autopipe.compile(Net(2), plan=plan, args=(X,))
    assert caught.value.node in plan.starts
    backwards = dataclasses.replace(plan, stages=(plan.stages[0], *plan.stages[:0:-1]))
    with pytest.raises(PlanError, match="in its order"):
        autopipe.compile(Net(), plan=backwards, args=(X,))


def test_a_graph_that_differs_elsewhere_is_warned_of(plan: Plan) -> None:
    class Scaled(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = super().forward(x)
            return a * 2, b

    with pytest.warns(UserWarning, match="differs from the model's"):
        pipe = autopipe.compile(Scaled(), plan=plan, args=(X,))
    assert pipe.plan.starts == plan.starts


# ---------------------------------------------------------------------------- files that are none


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return edit


def in_plan(**fields: Any) -> Callable[[str], str]:
    return edited(lambda d: d["plan"].update(fields))


def in_stage(**fields: Any) -> Callable[[str], str]:
    return edited(lambda d: d["plan"]["stages"][1].update(fields))


def in_crossing(**fields: Any) -> Callable[[str], str]:
    return edited(lambda d: d["plan"]["crossings"][0].update(fields))


def first_times(data: dict[str, Any]) -> dict[str, Any]:
    return cast("dict[str, Any]", data["plan"]["stages"][1]["times"][0])


def one_size(plan: dict[str, Any]) -> dict[str, Any]:
    """Changes after which the plan has a single micro-batch."""
    stages = [stage | {"times": stage["times"][:1]} for stage in plan["stages"]]
    return {"sizes": [sum(plan["sizes"])], "stages": stages}


HOSTILE: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "empty": (lambda t: "", "JSON"),
    "cut off": (lambda t: t[: len(t) // 2], "JSON"),
    "a pickle": (lambda t: pickle.dumps(print), "not a plan"),
    "no text": (lambda t: b"\xff\xfe\x00", "not a plan"),
    "Python": (lambda t: "__import__('os').system('true')", "JSON"),
    "another thing": (lambda t: "[1, 2]", f"version {VERSION}"),
    "a later version": (edited(lambda d: d.update(version=VERSION + 1)), f"version {VERSION}"),
    "a version in words": (edited(lambda d: d.update(version=str(VERSION))), f"version {VERSION}"),
    "true for one": (edited(lambda d: d.update(version=True)), "version"),
    "not a number": (lambda t: t.replace(f'"version": {VERSION}', '"version": NaN'), "finite"),
    "nested": (lambda t: "[" * 100_000, "JSON"),
    "no chunks": (in_plan(chunks=0), "disagree"),
    "a name twice": (lambda t: t.replace('"model"', '"model": "a", "model"', 1), "once"),
    "no stages": (in_plan(stages=[]), "without stages"),
    "stages in a text": (in_plan(stages="three"), "stages"),
    "an unknown field": (in_plan(code="import os"), "plan.code"),
    "a missing field": (edited(lambda d: d["plan"].pop("sizes")), "plan.sizes"),
    "an unknown schedule": (in_plan(schedule="soon"), f"one of {', '.join(KINDS)}"),
    "no samples": (in_plan(sizes=[3, 0]), "without samples"),
    "more micro-batches than chunks": (in_plan(sizes=[1] * 9), "disagree"),
    "half a call": (in_stage(calls=1.5), "stages[1].calls"),
    "a yes for a count": (in_stage(calls=True), "stages[1].calls"),
    "time backwards": (edited(lambda d: first_times(d).update(forward=-1.0)), "negative"),
    "times of another size": (edited(lambda d: d["plan"]["stages"][1]["times"].pop()), "each size"),
    "bytes below nothing": (in_stage(peak_bytes=-1), "negative"),
    "a limit below nothing": (in_stage(limit_bytes=-1), "negative"),
    "another policy": (in_stage(remat="most"), f"one of {', '.join(policy_options())}"),
    "more than all": (in_stage(remat="1.5"), "stages[1].remat is an unknown policy"),
    "a bound below nothing": (in_plan(bound_seconds=-1.0), "negative"),
    "one batch in parts": (in_plan(whole=True), "whole batch"),
    "one batch, and room for another": (
        edited(lambda d: d["plan"].update(whole=True, chunks=2, **one_size(d["plan"]))),
        "whole batch",
    ),
    "several stages on a device": (in_plan(schedule="zb-v"), "3 stages on 3 devices"),
    "more devices than stages": (in_plan(devices=4), "more devices"),
    "no devices": (in_plan(devices=0), "more devices"),
    "a total too few": (in_plan(totals=[]), "totals"),
    "no end of time": (
        lambda t: t.replace('"forward": ', '"forward": 1e999, "x": '),
        "x",
    ),
    "a number for a name": (in_stage(first=7), "stages[1].first"),
    "no first call": (in_stage(first=None), "disagree"),
    "calls, but no first": (in_stage(calls=0), "disagree"),
    "one start for all": (in_stage(first="linear"), "start at one call"),
    "to no stage": (in_crossing(targets=[9]), "later stage"),
    "backwards": (in_crossing(source=2, targets=[1]), "later stage"),
    "to one stage twice": (in_crossing(source=None, targets=[1, 1]), "twice"),
    "of no kind": (in_crossing(kind="secret"), "input, activation, parameter"),
    "a negative size": (in_crossing(nbytes=-1), "negative"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_plan_is_refused(path: Path, name: str) -> None:
    change, said = HOSTILE[name]
    content = change(path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_numbers_that_no_float_holds(path: Path) -> None:
    text = path.read_text()
    for number in ("1" * 400, "1" * 5000):
        path.write_text(text.replace('"forward": ', f'"forward": {number}, "x": '))
        with pytest.raises(PlanError):
            Plan.load(path)


def test_a_file_too_large_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopipe.typed_json.LARGEST_FILE", 100)
    with pytest.raises(PlanError, match="at most 100 bytes"):
        Plan.load(path)


def test_a_missing_file_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        autopipe.compile(Net(), plan=tmp_path / "none.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_gives_a_plan_or_says_what_is_wrong(
    tmp_path_factory: pytest.TempPathFactory, plan: Plan, data: st.DataObject
) -> None:
    """Somewhere in the file stands something else: never another exception, never a broken plan."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan.save(path)
    tree = json.loads(path.read_text())
    spots = list(_spots(tree))
    holder, key = data.draw(st.sampled_from(range(len(spots))).map(spots.__getitem__))
    holder[key] = data.draw(VALUES)
    path.write_text(json.dumps(tree))
    try:
        found = Plan.load(path)
    except PlanError:
        return
    found.verify()
    assert isinstance(found.chunks, int)
    found.save(path)
    assert Plan.load(path) == found


def _spots(tree: Any) -> Any:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in pairs:
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _spots(value)


def test_verify_breaks_a_plan_made_by_hand(plan: Plan) -> None:
    with pytest.raises(VerifyError, match="without stages"):
        dataclasses.replace(plan, stages=()).verify()
    plan.verify()


def test_errors_are_autopipes_own() -> None:
    assert issubclass(PlanError, AutopipeError)
    assert copy.copy(PlanError("x")).problem == "x"


def test_sizes_that_a_stage_works_out_are_no_calls_of_the_model() -> None:
    """In a stage's graph ``2 * B`` may be named `mul`, as a product in the model is."""

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)).double()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                h = layer(x)
                x = (h.view(h.shape[0] * 2, 3).tanh() * h.view(h.shape[0] * 2, 3)).view(-1, 6)
            return x

    plan = autopipe.plan(Doubled(), ["cpu"] * 4, 3, args=(X,))
    pipe = autopipe.compile(Doubled(), plan=plan, args=(X,))
    nodes = [n for n in pipe.captured.graph_module.graph.nodes if n.op == "call_function"]
    calls = [n.name for n in nodes if isinstance(n.meta["val"], Tensor)]
    assert sum(s.calls for s in plan.stages) == len(calls)
    starts = [calls.index(s.first) for s in plan.stages if s.first is not None]
    assert starts == list(itertools.accumulate([0, *[s.calls for s in plan.stages[:-1]]]))
    assert sum(s.flops for s in plan.stages) == 4 * 2 * 3 * 6 * 6
    assert pipe.plan == plan


def rearranged(plan: dict[str, Any], draw: random.Random) -> None:
    """Change what `compile` reads of a plan: names, stages, sizes, policies, modes."""
    stages = plan["stages"]
    names = ["linear", "linear_1", "tanh", "tanh_2", "add", "mean", "dropout", "nope", ""]
    match draw.randrange(8):
        case 0:
            draw.choice(stages)["first"] = draw.choice(names)
        case 1:
            count = draw.randrange(5)
            begins = [{"call": draw.choice(names), "stage": draw.randrange(3)}] * count
            plan["begins"] = begins
        case 2:
            lists = ([], [0], [0, 1], [1, 2], [2, 1], [0, 0], [0, 1, 2])
            plan["repeated"] = [{"call": draw.choice(names), "stages": draw.choice(lists)}]
        case 3:
            plan["chunks"] = draw.choice((3, 4, 10**6, 2**63))
        case 4:
            draw.choice(stages)["remat"] = draw.choice(("none", "full", "0.5", "1e-320", "min-cut"))
        case 5:
            plan.update(one_size(plan), whole=draw.random() < 0.5, chunks=draw.choice((1, 2)))
        case 6:
            plan["training"] = not plan["training"]
        case _:
            plan["stages"] = draw.choice((stages[:2], stages[:1], stages[::-1], stages * 2))
            plan["crossings"] = []


@pytest.mark.filterwarnings("ignore:.*differs from the model's")
@pytest.mark.parametrize("seed", range(6))
def test_compile_obeys_a_changed_plan_or_refuses_it(path: Path, seed: int) -> None:
    """It runs with eager's results, or is a `PlanError`: never a failed check of a pass."""
    draw, text, ran = random.Random(seed), path.read_text(), 0
    for _ in range(12):
        tree = json.loads(text)
        for _ in range(draw.choice((1, 1, 2))):
            rearranged(tree["plan"], draw)
        path.write_text(json.dumps(tree))
        pipe = compiled_or_refused(path)
        if pipe is not None:
            assert_agrees(pipe, X)
            assert str(pipe.plan)
            ran += 1
    assert ran > 0


def compiled_or_refused(path: Path) -> autopipe.Pipeline | None:
    try:
        return autopipe.compile(Net(), plan=path, args=(X,))
    except PlanError:
        return None
