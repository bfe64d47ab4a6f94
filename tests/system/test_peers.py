"""What torch.distributed.pipelining 2.13 cannot train, side by side: here it must be right.

The models are those of `benchmarks.five_cases`; `python -m benchmarks.pipelining --cases` runs the
same ones through torch's pipelining. Truth is eager torch on the whole batch, in float64.
"""

from __future__ import annotations

import copy
import signal

import numpy
import pytest
import torch

import autopipe
from autopipe.report.stages import BoundaryTensor
from benchmarks import pipelining
from benchmarks.five_cases import CASES
from benchmarks.peers import halfway, judge, run, try_model
from tests.support.agreement import assert_agrees, assert_close

pytestmark = [pytest.mark.few(3), pytest.mark.usefixtures("alike_models_once")]

REMATS = ("none", "full", "min-cut")


def pipeline(name: str, remat: str = "full") -> autopipe.Pipeline:
    """The case's model, in as many stages as it is cut by hand elsewhere."""
    case = CASES[name]
    model, x, _ = case.build()
    devices = len(case.split) + 1
    return autopipe.compile(model, devices, case.chunks, remat=remat, args=(x,))


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_cases_loss(name: str, remat: str) -> None:
    case = CASES[name]
    model, x, target = case.build()
    expected = case.loss(model(x), target)
    expected.backward()
    pipe = pipeline(name, remat)
    loss = case.loss(pipe(x), target)
    loss.backward()
    assert_close(loss, expected, "loss")
    for (key, p), q in zip(pipe.named_parameters(), model.parameters(), strict=True):
        assert_close(p.grad, q.grad, key)


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_of_all_of_them(name: str) -> None:
    assert_agrees(pipeline(name), CASES[name].build()[1].requires_grad_())


@pytest.mark.parametrize("name", CASES)
def test_three_steps_of_an_optimizer(name: str) -> None:
    case = CASES[name]
    pipe, (_, x, target) = pipeline(name), case.build()
    model = copy.deepcopy(pipe.model)
    for module in (pipe, model):
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            case.loss(module(x), target).backward()
            optimizer.step()
    for (key, p), q in zip(pipe.named_parameters(), model.parameters(), strict=True):
        assert_close(p, q, key)


# ------------------------------------------------------------ each case truly is where it is cut


def activations(pipe: autopipe.Pipeline) -> list[BoundaryTensor]:
    return [b for stage in pipe.stages for b in stage.outputs if b.kind == "activation"]


def test_a_value_crosses_to_two_later_stages() -> None:
    crossing = activations(pipeline("skip"))
    assert [(b.source, b.targets) for b in crossing if len(b.targets) > 1] == [(0, (1, 2))]


def test_an_auxiliary_output_is_made_by_the_middle_stage() -> None:
    returned = {b.source: b.targets for b in activations(pipeline("auxiliary")) if b.returned}
    assert returned == {1: (2,), 2: ()}


def test_a_tied_weight_is_used_by_both_stages() -> None:
    first, second = pipeline("tied").stages
    assert "first.weight" in first.parameters
    assert "second.weight" not in second.parameters
    (shared,) = [b for b in second.inputs if b.kind == "parameter"]
    assert (shared.source, shared.targets) == (0, (1,))


def test_the_micro_batches_differ_in_size() -> None:
    pipe = pipeline("indivisible")
    pipe(CASES["indivisible"].build()[1])
    assert pipe.plan.sizes == (3, 3, 2, 2)


def test_the_dict_is_a_dict() -> None:
    pipe = pipeline("dict")
    assert len(pipe.stages) == 2
    assert list(pipe(CASES["dict"].build()[1])) == ["prediction"]


# ------------------------------------------------------------ the benchmark that runs the others

EAGER = {"a.weight": numpy.array([3.0, 4.0]), "b.weight": numpy.array([3.0, 4.0])}
TIED = [["a.weight", "b.weight"]]


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        ([{"a.weight": [3.0, 4.0]}], "right"),
        ([{"a.weight": [3.0, 4.0]}, {"b.weight": [3.0, 4.0]}], "right"),
        ([{"a.weight": [1.0, 4.0]}, {"b.weight": [2.0, 0.0]}], "tied"),
        ([{"a.weight": [3.0, 4.1]}], "wrong"),
        ([{"a.weight": [3.0, numpy.nan]}], "wrong"),
        ([{}, {}], "wrong"),
    ],
)
def test_how_gradients_are_judged(found: list[dict[str, list[float]]], kind: str) -> None:
    arrays = [{name: numpy.array(g) for name, g in stage.items()} for stage in found]
    assert judge(EAGER, TIED, arrays).kind == kind


@pytest.mark.full
def test_a_hang_is_an_outcome() -> None:
    kind, who = run([(signal.pause,)], seconds=0.5)
    assert (kind, who) == ("hang", "1 of 1 after 0 s")


def test_half_way_is_where_half_of_the_layers_have_run() -> None:
    example = pipelining.case_example(CASES["skip"])
    assert halfway(example) == "second"


@pytest.mark.full
@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the claim is about 2.13")
def test_the_control_is_trained_by_both_and_the_others_by_one() -> None:
    control, *cases = pipelining.cases().values()
    assert {o.kind for o in try_model(control).values()} == {"right"}
    for trial in cases:
        outcomes = try_model(trial)
        assert outcomes["autopipe"].kind == "right"
        assert outcomes["pipelining"].kind in ("wrong", "tied", "error", "hang")
