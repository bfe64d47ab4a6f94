"""CSV files: round trips with torch's own schedules, its parser and its validator."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from torch.distributed.pipelining import schedules as torch_schedules

from autopipe.errors import OptionError, VerifyError
from autopipe.passes.schedule import (
    KINDS,
    Action,
    Scheduled,
    read_schedule,
    schedule,
    write_schedule,
)

LETTERS = {"F": "F", "B": "RBW", "I": "RB", "W": "W"}
EVERY = [(kind, None) for kind in KINDS] + [("interleaved", 3)]


def torch_stages(K: int, v: int) -> list[Any]:
    """What torch's schedules ask of the stages of device 0; no process group is needed."""
    common = {"num_stages": K * v, "group_size": K, "group_rank": 0, "submod": nn.Identity()}
    return [
        SimpleNamespace(stage_index=k, is_first=k == 0, is_last=k == K * v - 1, **common)
        for k in range(v)
    ]


def torch_order(name: str, K: int, M: int) -> dict[int, list[Any]]:
    """The actions of a schedule of torch's, per device; its `pipeline_order`."""
    kind = getattr(torch_schedules, f"Schedule{name}")
    if issubclass(kind, torch_schedules.PipelineScheduleSingle):
        made = kind(torch_stages(K, 1)[0], M, loss_fn=lambda a, b: a)
        # torch adds sums among replicas here already, and refuses them in "compute_only"
        return {
            rank: [a for a in row if a is None or a.is_compute_op]
            for rank, row in made.pipeline_order.items()
        }
    made = kind(torch_stages(K, 2), M, loss_fn=lambda a, b: a)
    order: dict[int, list[Any]] = made.pipeline_order
    return order


def as_csv(order: dict[int, list[Any]]) -> str:
    """As torch's `_dump_csv` writes it."""
    return "".join(
        ",".join("" if a is None else str(a) for a in order[rank]) + "\r\n" for rank in order
    )


def as_actions(order: dict[int, list[Any]]) -> tuple[tuple[Action, ...], ...]:
    """torch's actions as ours."""
    return tuple(
        tuple(
            Action(LETTERS[a.computation_type.value], a.stage_index, a.microbatch_index)
            for a in order[rank]
            if a is not None
        )
        for rank in sorted(order)
    )


def load(path: Path, K: int, v: int, M: int) -> Any:
    """torch's runtime with a schedule from a file: parsed, validated, with sends and receives."""
    made = torch_schedules._PipelineScheduleRuntime(torch_stages(K, v), M, loss_fn=lambda a, b: a)
    made._load_csv(str(path), format="compute_only")
    return made


@pytest.mark.parametrize(
    "name", ["GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"]
)
@pytest.mark.parametrize(("K", "M"), [(1, 2), (2, 4), (3, 6), (4, 12)])
def test_schedules_of_torch_are_read(name: str, K: int, M: int) -> None:
    order = torch_order(name, K, M)
    made = read_schedule(as_csv(order), name)
    made.verify()
    assert made.devices == as_actions(order)
    assert (made.kind, made.chunks) == (name, M)


@pytest.mark.parametrize(("name", "kind"), [("GPipe", "gpipe"), ("Interleaved1F1B", "interleaved")])
@pytest.mark.parametrize(("K", "M"), [(2, 4), (4, 8)])
def test_torch_has_the_same_gpipe_and_interleaved_1f1b(
    name: str, kind: str, K: int, M: int
) -> None:
    assert read_schedule(as_csv(torch_order(name, K, M))).devices == schedule(kind, K, M).devices


@pytest.mark.parametrize(("K", "M"), [(2, 4), (4, 8)])
def test_1f1b_of_torch_is_read_where_torch_itself_would_accept_it(K: int, M: int) -> None:
    """`pipeline_order` of Schedule1F1B (torch 2.13) has the last stage start at micro-batch 1."""
    order = torch_order("1F1B", K, M)
    try:
        torch_schedules._validate_schedule(order, K, K, M)
    except AssertionError:
        with pytest.raises(OptionError, match=rf"F0\.{M} is not scheduled on device 0"):
            read_schedule(as_csv(order))
        last = order[K - 1]
        order[K - 1] = [
            a._replace(microbatch_index=a.microbatch_index - 1) if a and str(a)[1] == "F" else a
            for a in last
        ]
    assert read_schedule(as_csv(order)).devices == schedule("1f1b", K, M).devices


@pytest.mark.parametrize(("K", "M"), [(2, 4), (3, 8)])
def test_overlaps_are_refused_and_their_parts_are_read(K: int, M: int) -> None:
    """DualPipeV, which mixes whole and split backwards at a stage."""
    order = torch_order("DualPipeV", K, M)
    row, column = next(
        (rank, i) for rank in order for i, a in enumerate(order[rank]) if a and a.sub_actions
    )
    where = rf"row {row + 1}, column {column + 1}: OVERLAP_F_B"
    with pytest.raises(OptionError, match=where) as caught:
        read_schedule(as_csv(order))
    assert str(order[row][column]) in str(caught.value.found)
    apart = {
        rank: [one for a in row for one in ((a and a.sub_actions) or [a])]
        for rank, row in order.items()
    }
    made = read_schedule(as_csv(apart))
    assert {a.phase for row in made.devices for a in row} == {"F", "RBW", "RB", "W"}
    assert made.devices == as_actions(apart)


def test_gradients_in_another_order_are_refused() -> None:
    """Looped BFS runs the backwards of a stage from the last micro-batch to the first."""
    with pytest.raises(OptionError, match=r"RBW0\.3 on device 0 is out of order"):
        read_schedule(as_csv(torch_order("LoopedBFS", 2, 4)))


@pytest.mark.parametrize(("kind", "v"), EVERY)
@pytest.mark.parametrize(("K", "M"), [(1, 3), (2, 2), (3, 7), (4, 8)])
def test_torch_reads_every_kind(kind: str, v: int | None, K: int, M: int, tmp_path: Path) -> None:
    """Its parser, its validator, its pass that adds sends and receives, and its simulator."""
    made = schedule(kind, K, M, virtual_stages=v)
    path = tmp_path / "schedule.csv"
    path.write_text(write_schedule(made))
    loaded = load(path, K, made.stages // K, M)
    assert as_actions(loaded.pipeline_order) == made.devices
    assert loaded.stage_index_to_group_rank == {
        action.stage: device for device, row in enumerate(made.devices) for action in row
    }
    orders = {
        rank: [a for a in row if "SHARD" not in str(a) and "REDUCE" not in str(a)]
        for rank, row in loaded.pipeline_order_with_comms.items()
    }
    homes = loaded.stage_index_to_group_rank
    torch_schedules._simulate_comms_compute(orders, lambda stage: homes[stage], made.stages)
    loaded._dump_csv(str(path), format="compute_only")
    with path.open(newline="") as file:
        assert read_schedule(file.read(), kind) == made


@pytest.mark.parametrize(("kind", "v"), EVERY)
def test_what_is_written_is_read_back(kind: str, v: int | None) -> None:
    for K, M in [(1, 1), (3, 5), (4, 2)]:
        made = schedule(kind, K, M, virtual_stages=v)
        assert read_schedule(write_schedule(made), kind) == made
        early = schedule(kind, K, M, virtual_stages=v, early_recompute=True)
        assert read_schedule(write_schedule(early), kind) == made
        forward = schedule(kind, K, M, virtual_stages=v, backward=False)
        assert read_schedule(write_schedule(forward), kind) == forward


@pytest.mark.parametrize(("kind", "v"), EVERY)
def test_what_an_action_waits_for_is_further_left(kind: str, v: int | None) -> None:
    made = schedule(kind, 3, 7, virtual_stages=v)
    column = {
        cell: i
        for line in write_schedule(made).split()
        for i, cell in enumerate(line.split(","))
        if cell
    }
    for row in made.devices:
        for action in row:
            names = {"F": "F", "B": "IB"}
            cells = [
                cell
                for need in action.needs(made.stages)
                if need.phase != "R"
                for letter in names[need.phase]
                if (cell := f"{need.stage}{letter}{need.microbatch}") in column
            ]
            letter = {text: cell for cell, text in LETTERS.items()}[action.phase]
            own = column[f"{action.stage}{letter}{action.microbatch}"]
            assert all(column[cell] < own for cell in cells)


def test_a_file_by_hand() -> None:
    """Two devices, the second waits for the first; R by itself has no cell."""
    rows = (
        (Action("F", 0, 0), Action("R", 0, 0), Action("B", 0, 0), Action("W", 0, 0)),
        (Action("F", 1, 0), Action("RBW", 1, 0)),
    )
    assert write_schedule(Scheduled("own", 2, 1, rows)) == "0F0,,,0I0,0W0\n,1F0,1B0\n"
    assert str(read_schedule(" 0F0 ,,,0I0,0W0\r\n,1F0,1B0,,\r\n", "own")).splitlines() == [
        "own: 2 stages, 1 micro-batches",
        "device 0   F0.0   RB0.0  W0.0",
        "device 1   F1.0   RBW1.0",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("0F0,0B0\n\n", "row 2: no actions"),
        ("0F0,0B0\n , ,\n", "row 2: no actions"),
        ("0F0,0X0\n", "row 1, column 2 is no action"),
        ("0F0,0B\n", "row 1, column 2 is no action"),
        ("0F0,,-1B0\n", "row 1, column 3 is no action"),
        ("0F0,0B0 0B1\n", "row 1, column 2 is no action"),
        ("0F0,0b0\n", "row 1, column 2 is no action"),
        ("0F0;0B0\n", "row 1, column 1 is no action"),
        ("0F0,0B0\n1F0,1B٣\n", "row 2, column 2 is no action"),
        ("0F0,0B0\n1F0,1SEND_F0,1B0\n", "row 2, column 2: SEND_F is not an action"),
        ("0UNSHARD,0F0,0B0\n", "row 1, column 1: UNSHARD is not an action"),
        ("0F0,0B0,0REDUCE_GRAD\n", "row 1, column 3: REDUCE_GRAD is not an action"),
        ("(0F0;0B0)OVERLAP_F_B\n", "row 1, column 1: OVERLAP_F_B is not an action"),
        ("0F0,0B0\n0F0,0B0\n", "F0.0 on device 1: a stage must be on one device"),
        ("0F0,0B0\n2F0,2B0\n", "F2.0 on device 1, but nothing runs stage 1"),
        ("0F1,0B1\n", "F0.1 on device 0, but nothing runs micro-batch 0"),
        ("0F0,999999999F999999999,0B0\n", "F999999999.999999999 on device 0, but nothing runs"),
        ("0F0,0I0\n", "W0.0 is not scheduled on device 0"),
        ("0F0,0W0,0I0\n", "device 0 can never run W0.0"),
        ("0F0,0F1,0B1,0B0\n", "RBW0.1 on device 0 is out of order"),
        ("0F1,0F0,0B0,0B1\n", "F0.1 on device 0 is out of order"),
        ('0F0,"' + "0" * 200_000 + '"\n', "is no CSV"),
    ],
)
def test_malformed_files_are_refused_by_their_place(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_schedule(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_is_no_text_and_what_is_no_schedule() -> None:
    with pytest.raises(OptionError, match="a text"):
        read_schedule(b"0F0")  # type: ignore[arg-type]
    with pytest.raises(VerifyError, match="is not scheduled"):
        write_schedule(Scheduled("own", 1, 2, ((Action("F", 0, 0),),)))
