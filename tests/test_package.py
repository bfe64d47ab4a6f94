"""The package as it is imported from a checkout that lacks its symbolic link."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(folder: Path, code: str = "import autopipe") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        check=False,
    )


def clone(folder: Path) -> None:
    """What `git clone` leaves where it does not create links: a file with the link's target."""
    ignored = shutil.ignore_patterns("passes", "__pycache__")
    shutil.copytree(ROOT / "autopipe", folder / "autopipe", ignore=ignored)
    shutil.copytree(ROOT / "passes", folder / "passes", ignore=ignored)
    (folder / "autopipe" / "passes").write_text("../passes", encoding="utf-8")


def test_a_checkout_without_its_link_says_what_to_do(tmp_path: Path) -> None:
    clone(tmp_path)
    done = imported(tmp_path)
    assert done.returncode == 1
    assert "ImportError: this checkout of autopipe lacks a symbolic link" in done.stderr
    assert "git config core.symlinks true" in done.stderr
    assert "git checkout -- autopipe/passes" in done.stderr
    assert "wheel" in done.stderr
    (tmp_path / "autopipe" / "passes").unlink()
    (tmp_path / "autopipe" / "passes").symlink_to("../passes")
    assert imported(tmp_path, "import autopipe; autopipe.simulate").returncode == 0


@pytest.mark.skipif(not (ROOT / ".git").is_dir(), reason="this is no clone")
def test_the_commands_of_that_error_repair_a_clone(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], check=True, capture_output=True, timeout=60)

    home = tmp_path / "clone"
    git("clone", "-q", "--depth=1", "-c", "core.symlinks=false", ROOT.as_uri(), str(home))
    assert (home / "autopipe" / "passes").read_text(encoding="utf-8") == "../passes"
    git("-C", str(home), "config", "core.symlinks", "true")
    git("-C", str(home), "checkout", "--", "autopipe/passes")
    assert (home / "autopipe" / "passes").is_symlink()
    assert imported(home, "import autopipe.passes.schedule").returncode == 0
