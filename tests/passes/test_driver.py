"""The passes in order: what is dumped, what progress reports, what the cache saves."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import torch

from autopipe.call_signature import flatten
from autopipe.passes import driver
from autopipe.passes.capture.request import CaptureRequest
from autopipe.passes.driver import (
    _dump,
    _warn_once,
    capture_with_costs,
    cut_into_stages,
    lower_to_code,
    phases_by_size,
)
from autopipe.passes.phases import TraceCache
from autopipe.passes.remat_policies import LADDER
from autopipe.passes.schedule import schedule_for
from autopipe.tensor_meta import training_request
from tests.support.phased import Layers
from tests.support.programs import CPU, objective_for

X = torch.randn(6, 6)


def test_from_a_model_to_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPIPE_DUMP", str(tmp_path / "dump"))
    model, steps = Layers(2), list[str]()
    leaves, spec = flatten((X,), {})
    annotated = capture_with_costs(CaptureRequest(model, leaves, spec, (0,)), steps.append)
    split = cut_into_stages(annotated, objective_for(2, 3), progress=steps.append)
    request = training_request(model, split, leaves, [3, 3], [CPU, CPU], LADDER[-1:] * 2)
    cache = TraceCache()
    phased = phases_by_size(request, cache, steps.append)
    lowered = lower_to_code(
        phased,
        [3, 3],
        [CPU, CPU],
        order=schedule_for("gpipe", 2),
        early_backward=True,
        least_queue=lambda source, to: 2,
        progress=steps.append,
    )
    traced = ["tracing stage 1", "tracing stage 0"]
    assert steps == ["capturing", "costing", "splitting", *traced, "writing the program"]
    assert phases_by_size(request, cache, steps.append)[3].stages[0].graph is (
        phased[3].stages[0].graph
    )
    assert len(steps) == 6
    files = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert [n.split("-")[1] for n in files] == [
        *("captured.txt", "annotated.txt", "split.txt", "phased.txt"),
        *("scheduled.txt", "generated.py"),
    ]
    assert (tmp_path / "dump" / files[-1]).read_text() == f"{lowered.generated}\n"
    assert lowered.phased is phased


def dumped(place: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Dump programs there; the warnings."""
    monkeypatch.setenv("AUTOPIPE_DUMP", place)
    leaves, spec = flatten((X,), {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        annotated = capture_with_costs(CaptureRequest(Layers(2), leaves, spec, (0,)))
        cut_into_stages(annotated, objective_for(2, 3))
    return [str(w.message) for w in caught if "AUTOPIPE_DUMP" in str(w.message)]


@pytest.mark.parametrize(
    "place",
    ["file", "file/deeper", "/proc/autopipe", "x" * 300, "/dev/null", "\x1b[31m/" + "x" * 300],
)
def test_where_no_program_can_be_dumped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """One warning, not one for each program; and the passes go on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    _warn_once.cache_clear()
    (said,) = dumped(place, monkeypatch)
    assert said.isprintable()


def test_programs_are_dumped_in_any_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of files that a program tells may be any bytes."""
    monkeypatch.setenv("AUTOPIPE_DUMP", str(tmp_path / "größe"))
    _dump("captured", "# File: größe/\udcff.py")
    (path,) = (tmp_path / "größe").iterdir()
    assert path.read_bytes() == "# File: größe/\\udcff.py\n".encode()


def test_processes_that_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each numbers its programs from 1; none replaces a file of another."""
    monkeypatch.setenv("AUTOPIPE_DUMP", str(tmp_path))
    for text in ("one", "two"):
        monkeypatch.setattr(driver, "_dumped", itertools.count(1))
        _dump("captured", text)
        _dump("generated", text, suffix="py")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "001-captured.txt": "one\n",
        "002-generated.py": "one\n",
        "003-captured.txt": "two\n",
        "004-generated.py": "two\n",
    }
