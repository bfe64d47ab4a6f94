"""A page, read back: its elements and texts, as a browser's parser would have them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from xml.etree import ElementTree

VOID = {"meta", "input"}


@dataclass
class Element:
    """An element: its name, attributes, and all text within it."""

    name: str
    attributes: dict[str, str | None]
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def classes(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())


class Page(HTMLParser):
    """Parses, and fails on an element that is not closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.source = text
        self.feed(text)
        self.close()
        assert self.open == [], [e.name for e in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        element = Element(tag, dict(attrs))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.texts.append(data)

    def named(self, name: str) -> list[Element]:
        return [e for e in self.elements if e.name == name]

    def svg(self, name: str) -> ElementTree.Element:
        """A drawing as XML."""
        found = re.findall(rf'<svg id="{name}".*?</svg>', self.source, re.DOTALL)
        assert len(found) == 1
        return ElementTree.fromstring(found[0])
