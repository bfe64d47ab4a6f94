"""``autopipe report`` and ``autopipe trace``: files that are read and written.

Covers commands/_files.py, commands/report.py and commands/trace.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from autopipe import Plan
from autopipe.cli import main
from autopipe.errors import UnsupportedError
from tests.support.command_line import assert_refused, planning
from tests.support.plans import made_plan


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
        assert len([e for e in json.loads(text)["traceEvents"] if e["ph"] == "X"]) == 24


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


WRONG = {
    "no plan": (["report", "none.json"], "none.json: No such file"),
    "a folder": (["report", "."], "cannot be"),
    "not a plan": (["report", "models.py"], "not a plan"),
    "trace of no plan": (["trace", "models.py"], "not a plan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_code_2(
    models: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    assert_refused(capsys, *WRONG[case])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that cannot be written")
def test_what_cannot_be_written_is_a_message(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_plan().save("plan.json")
    for arguments in (planning("models.py:with_args"), ["report", "plan.json"]):
        assert main([*arguments, "-o", "/dev/full"]) == 2
        assert "the output cannot be written" in capsys.readouterr().err
