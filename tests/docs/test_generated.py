"""The generated pages are up to date (else: ``make docs``), and say what the tables hold."""

from __future__ import annotations

from autopipe.passes.remat_policies import POLICIES
from autopipe.passes.schedule.kinds import KINDS
from tests.support import package_map, tables_page
from tests.support.generated_docs import BEGIN, DOCS, END, with_map
from tests.test_house import FLOORS, LAYERS


def test_the_tables_are_up_to_date() -> None:
    text = (DOCS / "tables.md").read_text(encoding="utf-8")
    assert text == tables_page.page()
    for name in (*KINDS, *(p.name for p in POLICIES)):
        assert f"| `{name}` |" in text


def test_the_map_is_up_to_date() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text == with_map(text)


def test_every_package_is_on_the_map() -> None:
    picture = package_map.picture()
    for name in set().union(*FLOORS, *LAYERS) - {"commands", "errors"}:
        assert f" {name}" in picture
    assert "  6  driver\n" in picture
