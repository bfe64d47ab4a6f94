"""Schedules of users run: functions, files, several stages per device. Covers user_kind.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autopipe
from autopipe.errors import OptionError, PartitionError, PlanError
from autopipe.passes.schedule import Scheduled, schedule
from tests.support.early_schedules import Layers, assert_same, batch, step


def one_by_one(K: int, M: int) -> list[list[str]]:
    """Each micro-batch through the whole model before the next; two stages per device."""
    rows = []
    for down, up in ((k, 2 * K - 1 - k) for k in range(K)):
        turns = (("F", down), ("F", up), ("B", up), ("B", down), ("W", up), ("W", down))
        rows.append([f"{letters}{stage}.{m}" for m in range(M) for letters, stage in turns])
    return rows


def batches(K: int, M: int) -> list[list[str]]:
    """GPipe's order, as a user writes it."""
    return [[f"{x}{k}.{m}" for x in ("F", "BW") for m in range(M)] for k in range(K)]


@pytest.mark.parametrize("remat", ["full", "none"])
def test_a_function_runs_with_gpipes_bits(remat: str) -> None:
    expected = step(Layers(), (batch(), {}), devices=4, chunks=3, remat=remat)
    found = step(Layers(), (batch(), {}), devices=2, chunks=3, remat=remat, schedule=one_by_one)
    assert_same(found, expected)


def test_the_last_batch_of_an_epoch_has_fewer_micro_batches() -> None:
    pipe = autopipe.compile(Layers(), devices=2, chunks=4, schedule=one_by_one)
    for samples in (8, 2):
        pipe(*batch(samples)).backward()
        chunks = pipe.scheduled.chunks
        assert chunks == min(4, samples)
        ran = [a for a in pipe.scheduled.devices[0] if a.phase != "R"]
        assert len(ran) == 6 * chunks


def test_forwards_first_needs_no_loss() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    pipe = autopipe.compile(model, devices=2, chunks=2, schedule=batches)
    x = torch.randn(4, 4)
    pipe(x).sum().backward()
    assert torch.equal(pipe(x), torch.cat([model(x[:2]), model(x[2:])]))


def test_torchs_file_is_read_and_ours_written() -> None:
    text = autopipe.write_schedule(schedule("zb-v", 2, 4))
    pipe = autopipe.compile(Layers(), 2, schedule=autopipe.read_schedule(text))
    assert pipe.options.chunks == 4
    pipe(*batch(8)).backward()
    assert autopipe.write_schedule(pipe.scheduled) == text
    assert "F0.0" in autopipe.clock_table(pipe.scheduled)
    expected = step(Layers(), (batch(8), {}), devices=2, chunks=4, schedule="zb-v")
    found = step(Layers(), (batch(8), {}), devices=2, schedule=autopipe.read_schedule(text))
    assert_same(found, expected)


def test_a_plan_holds_it(tmp_path: Path) -> None:
    options = {"args": batch(8), "schedule": one_by_one}
    plan = autopipe.plan(Layers(), 2, 4, **options)
    assert plan.schedule == "one_by_one"
    plan.save(tmp_path / "plan.json")
    loaded = autopipe.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.timeline.makespan == plan.timeline.makespan
    expected = step(Layers(), (batch(8), {}), devices=2, chunks=4, schedule=one_by_one)
    assert_same(step(Layers(), (batch(8), {}), plan=tmp_path / "plan.json"), expected)
    text = (tmp_path / "plan.json").read_text()
    for before, after in (("F0.0 ", ""), ("W3.0", "W3.9"), ('"devices": 2', '"devices": 1')):
        assert before in text
        (tmp_path / "broken.json").write_text(text.replace(before, after, 1))
        with pytest.raises(PlanError):
            autopipe.Plan.load(tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"schedule": schedule("1f1b", 3, 4)}, "another number of devices"),
        ({"schedule": schedule("1f1b", 2, 4), "chunks": 5}, "other sizes"),
        ({"schedule": one_by_one, "virtual_stages": 2}, "says itself"),
        ({"schedule": lambda K, M: [["F0.0"]]}, "own"),
        ({"schedule": Path("schedule.csv")}, "unknown schedule"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(options, problem: str) -> None:
    with pytest.raises(OptionError) as caught:
        autopipe.compile(Layers(), devices=2, **options)
    assert problem in str(caught.value)


def test_the_plan_of_a_schedule_that_is_named_as_a_kind_is_itself_again(tmp_path: Path) -> None:
    options = {"args": batch(8), "schedule": schedule("zb-v", 2, 4)}
    plan = autopipe.plan(Layers(), 2, **options)
    assert plan.schedule == "own zb-v"
    plan.save(tmp_path / "plan.json")
    pipe = autopipe.compile(Layers(), plan=tmp_path / "plan.json")
    pipe(*batch(8)).backward()
    assert pipe.plan == plan
    again = autopipe.compile(Layers(), 2, schedule=pipe.scheduled)
    assert again.options.schedule.name == "own zb-v"


class Unhashable:
    """Callable; with an `__eq__`, so without a hash."""

    def __eq__(self, other: object) -> bool:
        return type(other) is Unhashable

    def __call__(self, K: int, M: int) -> list[list[str]]:
        return batches(K, M)


def as_scheduled(K: int, M: int) -> Scheduled:
    return schedule("1f1b", K, M)


@pytest.mark.parametrize("own", [Unhashable(), as_scheduled])
def test_any_callable_will_do_and_may_return_a_schedule(own) -> None:
    expected = step(Layers(), (batch(), {}), devices=2, chunks=3)
    assert_same(step(Layers(), (batch(), {}), devices=2, chunks=3, schedule=own), expected)


def forwards(K: int, M: int) -> list[list[str]]:
    return [[f"F{k}.{m}" for m in range(M)] for k in range(K)]


def without_w(K: int, M: int) -> list[list[str]]:
    return [[f"{x}{k}.{m}" for x in "FB" for m in range(M)] for k in range(K)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedule": forwards}, "'forwards' has forwards alone"),
        ({"schedule": schedule("1f1b", 2, 4, backward=False)}, "list the backwards, too"),
        ({"schedule": without_w}, 'write "BW0.0" for a whole backward'),
        ({"schedule": schedule("1f1b", 3, 2)}, "devices=3"),
        ({"schedule": schedule("1f1b", 2, 3)}, "use chunks=3"),
        ({"schedule": "interleaved", "virtual_stages": 10**9}, "at most 1,024"),
        ({"schedule": "interleaved", "virtual_stages": True}, "an integer >= 1"),
        ({"schedule": "interleaved", "virtual_stages": 0}, ">= 1"),
        ({"schedule": "1f1b", "virtual_stages": 2}, 'schedule="interleaved"'),
        ({"schedule": "zb-v", "remat": ["full"] * 3}, "2 values, or 4"),
        ({"schedule": "zb-v", "memory": ["1GiB"] * 4}, "one for each device"),
        ({"schedule": "auto", "virtual_stages": 2}, "beside virtual_stages"),
    ],
)
def test_a_mistake_is_named_with_what_to_do(options, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        autopipe.compile(Layers(), **{"devices": 2, "chunks": 4} | options)
    assert said in str(caught.value)


def test_more_stages_than_the_model_has_ops() -> None:
    pipe = autopipe.compile(Layers(), 2, 4, schedule="interleaved", virtual_stages=40)
    with pytest.raises(PartitionError, match="cut into 80 stages") as caught:
        pipe(*batch(8))
    assert "fewer stages on each" in str(caught.value.remedy)
