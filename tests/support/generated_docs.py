"""Write the generated parts of docs/: ``make docs``.

    docs/errors.md        every class of error, with what it prints
    docs/tables.md        what users can choose from
    docs/architecture.md  the map of packages, between its two markers

(docs/zoo.md takes minutes: ``make bench NAME=zoo``.)
"""

from __future__ import annotations

from pathlib import Path

from tests.support import errors_page, package_map, tables_page

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- begin: package map -->\n", "<!-- end: package map -->\n"


def with_map(text: str) -> str:
    """The architecture page with the map as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}```text\n{package_map.picture()}```\n{END}{after}"


def generated() -> dict[Path, str]:
    """Each page and the text that it should have."""
    architecture = DOCS / "architecture.md"
    return {
        DOCS / "errors.md": errors_page.page(),
        DOCS / "tables.md": tables_page.page(),
        architecture: with_map(architecture.read_text(encoding="utf-8")),
    }


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
