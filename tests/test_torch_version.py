"""Which torch is accepted, and what is said of another. Covers torch_version.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import autopipe
from autopipe.cli import main
from autopipe.errors import UnsupportedError
from autopipe.torch_version import OVERRIDE, TESTED, check_torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="tomllib is in Python 3.11 and later")

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)


def test_tested_releases_are_accepted() -> None:
    check_torch()
    for release in TESTED:
        for suffix in (".0", ".1+cpu", ".0a0+git1234", ".0.dev20260101+cu130"):
            check_torch(release + suffix)


@pytest.mark.parametrize("version", ["2.14.0", "2.14.0.dev20260101", "2.10.1", "3.0.0+cpu", "2"])
def test_others_are_an_error_that_names_those(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_torch(version)
    assert caught.value.expected == "torch 2.11, 2.12 or 2.13"
    assert caught.value.found == f"torch {version}"
    assert '"torch>=2.11,<2.14"' in str(caught.value.remedy)
    monkeypatch.setenv(OVERRIDE, "1")
    check_torch(version)


def test_it_is_asked_before_torch_is_touched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the first use of `compile`, `plan` and `Pipeline`, and by the command."""
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    for name in ("compile", "plan", "Pipeline"):
        monkeypatch.delitem(vars(autopipe), name, raising=False)
        with pytest.raises(UnsupportedError, match=r"torch 2\.99\.0"):
            getattr(autopipe, name)
    assert main(["plan", "model.py:made", "--devices", "2"]) == 2
    assert "torch 2.99.0" in capsys.readouterr().err
    assert autopipe.simulate is not None  # needs no torch


def test_the_bounds_of_the_package_are_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bound,) = [d for d in project["dependencies"] if d.startswith("torch")]
    with pytest.raises(UnsupportedError) as caught:
        check_torch("2.99")
    assert f'"{bound}"' in str(caught.value.remedy)
