"""Types of options: they are what the tables hold. Covers option_names.py."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_args

import pytest

import autopipe
from autopipe import option_names
from autopipe.option_parsing import BACKENDS
from autopipe.options import BATCH_NORM
from autopipe.passes.inductor import MODES
from autopipe.passes.ir import REDUCTIONS
from autopipe.passes.remat_policies import POLICIES
from autopipe.passes.schedule import KINDS

POLICY_NAMES = {p.option for p in POLICIES}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (option_names.Schedule, {*KINDS, "auto"}),
        (option_names.Remat, {*POLICY_NAMES, "auto"}),
        (option_names.StageRemat, POLICY_NAMES),
        (option_names.BatchNorm, {*BATCH_NORM}),
        (option_names.OutReduce, {*REDUCTIONS}),
        (option_names.Backend, {*BACKENDS}),
        (option_names.Mode, {*MODES}),
    ],
)
def test_the_types_have_the_names_of_the_tables(names: object, expected: set[str]) -> None:
    assert {*get_args(names)} == expected


def test_the_signatures_use_them() -> None:
    for call in (autopipe.compile, autopipe.plan):
        found = {n: p.annotation for n, p in inspect.signature(call).parameters.items()}
        assert found["schedule"].startswith("Schedule")
        assert found["remat"].startswith("Remat | float | Sequence[StageRemat | float]")
        assert found["batch_norm"] == "BatchNorm"
        assert found["out_reduce"] == "OutReduce | None"
    assert inspect.signature(autopipe.compile).parameters["backend"].annotation == "Backend"


@pytest.mark.full
def test_a_type_checker_finds_a_wrong_name(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    script = tmp_path / "script.py"
    script.write_text(
        "import autopipe\nfrom torch import nn\n"
        "autopipe.compile(nn.Linear(2, 2), 2, 2, remat='none', schedule='gpipe')\n"
        "autopipe.compile(nn.Linear(2, 2), 2, 2, remat=['full', 0.5], batch_norm='micro')\n"
        "autopipe.compile(nn.Linear(2, 2), 2, 2, remat='nome')\n"
        "autopipe.plan(nn.Linear(2, 2), 2, 2, schedule='1b1f')\n"
    )
    out, _, _ = api.run(["--strict", "--cache-dir", str(tmp_path / "cache"), str(script)])
    assert [line.split(":")[1] for line in out.splitlines() if " error: " in line] == ["5", "6"]
