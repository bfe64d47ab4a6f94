"""Files, functions, make targets and modules that the documents name exist."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from tests.support.documents import (
    ROOT,
    command_lines,
    is_file,
    make_targets,
    names,
    words_of_the_code,
)

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md")
OTHERS = ("docs/zoo.md", "docs/errors.md", "docs/guide.md", "docs/howto/trainers.md")
"""Pages that also name commands."""

ELSEWHERE = {".venv"}
"""Names that are not those of this code."""


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist(document: str) -> None:
    text = text_of(document)
    named = [n for n in names(text) if re.fullmatch(r"[\w.*/-]+(\.(py|md|toml|txt)|/)", n)]
    assert [n for n in named if not is_file(n)] == []
    links = [n.partition("#")[0] for n in re.findall(r"\]\(([^)]+)\)", text) if "://" not in n]
    home = (ROOT / document).parent
    assert [link for link in links if link and not (home / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_are_those_of_the_code(document: str) -> None:
    """Dotted names, calls and plain words between backticks: each part is a name in the code."""
    missing = []
    for name in names(text_of(document)):
        if not re.fullmatch(r"\.?[A-Za-z_]\w*(\[\w+\])?(\.\w+(\[\w+\])?)*(\(.*\))?", name):
            continue
        if re.search(r"\.(py|md|toml|txt|json)$", name) or name in ELSEWHERE:
            continue
        parts = re.split(r"\W+", re.sub(r"\(.*|\[\w+\]", "", name))
        if parts[0] == "torch":
            attrgetter(".".join(parts[1:]))(torch)  # else AttributeError
            continue
        missing += [name] if {*parts} - {""} - words_of_the_code() else []
    assert missing == []


@pytest.mark.parametrize("document", [*DOCUMENTS, *OTHERS])
def test_make_targets_exist(document: str) -> None:
    text = text_of(document)
    lines = [*command_lines(text), *names(text)]
    targets = [t for line in lines for t in re.findall(r"^make ([a-z-]+)", line)]
    assert [t for t in targets if t not in make_targets()] == []


@pytest.mark.parametrize("document", [*DOCUMENTS, *OTHERS])
def test_python_commands_name_modules_and_files(document: str) -> None:
    """What is run with ``python`` or ``pytest`` exists. (README's commands are also run.)"""
    text = text_of(document)
    for line in [*command_lines(text), *names(text)]:
        for module in re.findall(r"python3? -m ([\w.]+)", line):
            path = module.replace(".", "/")
            assert any((ROOT / p).exists() for p in (f"{path}.py", f"{path}/__main__.py")), line
        for file in re.findall(r"(?:python3?|pytest) ([\w/]+(?:\.py)?)(?:\s|$)", line):
            assert (ROOT / file).exists(), line


def test_the_check_can_fail() -> None:
    assert "no_such_function" + "_anywhere" not in words_of_the_code()
    assert not is_file("no_such" + "_file.py")
    assert is_file("split/cut.py")
    assert Path(__file__).name == "test_names.py"
