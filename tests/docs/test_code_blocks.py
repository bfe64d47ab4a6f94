"""Every code block of the documents is run by a test, or says that it is output or a command.

README.md's blocks: test_readme.py. docs/errors.md's: test_errors_page.py. The other pages are run
here, each from top to bottom.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.documents import ROOT, blocks, command_lines, languages
from tests.system.test_examples import LIBRARIES

PAGES = tuple(
    str(path.relative_to(ROOT))
    for path in (
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "RESULTS.md"),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
)
ELSEWHERE = {"README.md", "docs/errors.md"}
"""Pages whose Python other tests run."""

INCLUDED = re.compile(r'--8<-- "(.*)"\n')


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def scripts(page: str) -> list[str]:
    """The Python of a page, but for files that are included."""
    return [code for code in blocks(text_of(page), "python") if not INCLUDED.fullmatch(code)]


RUN_HERE = [page for page in PAGES if page not in ELSEWHERE and scripts(page)]


def test_there_are_pages_to_run() -> None:
    assert {"docs/guide.md", "docs/howto/from_torchgpipe.md"} <= {*RUN_HERE}
    assert {"docs/howto/from_pipelining.md", "docs/howto/from_accelerate.md"} <= {*RUN_HERE}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    assert {*languages(text_of(page))} <= {"python", "text", "console"}
    assert len(re.findall(r"^ *```", text_of(page), re.MULTILINE)) == 2 * len(
        languages(text_of(page))
    )


@pytest.mark.parametrize("page", PAGES)
def test_included_files_are_there_and_tested(page: str) -> None:
    for name in INCLUDED.findall(text_of(page)):
        assert (ROOT / name).is_file(), name
        if name.startswith("examples/"):
            assert Path(name).stem in LIBRARIES


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="`devices=2` means two GPUs, or none")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("page", RUN_HERE)
def test_the_python_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one namespace; what a page asserts, it asserts itself."""
    if "import Accelerator" in text_of(page):
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict[str, Any] = {"__name__": "page"}
    for code in scripts(page):
        exec(compile(code, page, "exec"), scope)
    assert "autopipe" in scope
    assert any("assert" in code for code in scripts(page)), "a page shows what it promises"


@pytest.mark.parametrize("page", PAGES)
def test_the_lines_of_consoles_are_commands(page: str) -> None:
    """`make`, `python` and `autopipe`: other tests run them or look for what they name."""
    bound = re.search(r'"(torch>=[^"]+)"', text_of("pyproject.toml"))
    for block in blocks(text_of(page), "console"):
        for line in block.splitlines():
            if line.startswith("pip install "):
                found = re.findall(r'"(torch.*?)"', line)
                assert found == [bound and bound[1]] * len(found)
            else:
                assert command_lines(f"```console\n{line}\n```"), line
