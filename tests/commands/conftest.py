"""A folder with models to plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.command_line import MODELS


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models.py, which is the working directory; sys.path is put back."""
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for name in ("models", "__autopipe_model__"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path
