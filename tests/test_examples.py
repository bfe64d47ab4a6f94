"""The examples run as a user would run them, and say what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {"quickstart.py": ["--steps", "6"]}


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *ARGUMENTS.get(name, [])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stage" in done.stdout
    assert "Traceback" not in done.stderr


def test_all_four_are_there() -> None:
    names = {p.name for p in EXAMPLES.glob("*.py")}
    assert names >= {"quickstart.py", "inspect_stages.py", "unet_skips.py", "encoder_decoder.py"}
