"""The site of docs/: it has every page and every public name, and needs no network."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import autopipe
from autopipe import errors
from tests.support.documents import ROOT

REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
ERRORS = [name for name, _ in inspect.getmembers(errors, inspect.isclass) if name.endswith("Error")]


def test_the_reference_has_every_public_name() -> None:
    documented = {*re.findall(r"^::: autopipe\.(\w+)$", REFERENCE, re.MULTILINE)}
    documented |= {*re.findall(r"^`autopipe\.(__version__)`", REFERENCE, re.MULTILINE)}
    assert documented - {"option_names"} == {*dir(autopipe)}


def test_every_public_name_has_a_docstring() -> None:
    for name in autopipe.__all__:
        thing = getattr(autopipe, name)
        assert thing.__doc__, name
        if inspect.isclass(thing):
            methods = inspect.getmembers(thing, inspect.isfunction)
            own = [(n, m) for n, m in methods if m.__module__.startswith("autopipe")]
            assert [n for n, m in own if not n.startswith("_") and not inspect.getdoc(m)] == []


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    pages = [str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


class Loaded(HTMLParser):
    """What a browser loads for a page, and the ids in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            if value and (name == "src" or (tag == "link" and name == "href")):
                self.sources.append(value)


@pytest.mark.full
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = {p: Loaded(p.read_text("utf-8")) for p in (tmp_path / "site").rglob("*.html")}
    assert len(pages) > 10
    outside = [s for page in pages.values() for s in page.sources if re.match(r"(https?:)?//", s)]
    assert outside == []
    ids = pages[tmp_path / "site" / "reference" / "index.html"].ids
    names = {n for n in autopipe.__all__ if n != "errors"} | {f"errors.{n}" for n in ERRORS}
    assert {f"autopipe.{n}" for n in names} <= ids
    results = (tmp_path / "site" / "results" / "index.html").read_text("utf-8")
    assert "--8&lt;--" not in results
    assert "benchmark" in results
