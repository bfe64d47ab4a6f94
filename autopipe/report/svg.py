"""Drawing primitives: text, escaped; elements as strings; round numbers for axes.

Names in a plan come from a file, so they are untrusted: whatever is drawn goes through `escape`,
and every element through `tag`.
"""

from __future__ import annotations

import html
import math
import re

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
)
"""What XML forbids, and what turns the direction of the text that follows."""

CHARACTER = 0.56
"""Mean width of a character, in font sizes; a little more than that of common sans-serif fonts."""


def escape(text: object) -> str:
    """Any text as the content or the quoted attribute of an element, unseen characters shown."""
    return html.escape(_UNSEEN.sub("\ufffd", str(text)), quote=True)


def tag(name: str, /, *content: str, **attributes: object) -> str:
    """An element.

    Args:
        name: of the element.
        content: what stands in it: elements, or text that `escape` made.
        attributes: values are escaped; None leaves one out; ``class_`` is ``class``, other
            underscores are hyphens. Numbers have two decimals at most.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(content)
    if name in ("meta", "input"):
        return f"<{name}{written}>"
    empty = not inner and name in ("rect", "path", "circle")
    return f"<{name}{written}/>" if empty else f"<{name}{written}>{inner}</{name}>"


def number(value: float) -> str:
    """A coordinate: two decimals at most, no trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def rect(x: float, y: float, width: float, height: float, class_: str, *content: str) -> str:
    """A rectangle, with what stands in it (a title)."""
    return tag("rect", *content, class_=class_, x=x, y=y, width=width, height=height)


def label(x: float, y: float, content: object, class_: str = "", anchor: str | None = None) -> str:
    """A line of text; `anchor` is "middle" or "end"."""
    return tag("text", escape(content), x=x, y=y, class_=class_ or None, text_anchor=anchor)


def title(content: object) -> str:
    """What is shown when the pointer rests on the element that it stands in."""
    return tag("title", escape(content))


def figure(name: str, heading: str, summary: str, width: float, height: float, *parts: str) -> str:
    """A drawing with its title and description, in a box that scrolls where the page is narrow.

    Args:
        name: part of its ids; unique on the page.
        heading, summary: for readers who do not see it.
        width, height: of the drawing, in its own units (pixels where there is room).
    """
    least, most = (min(width * 0.8, 940), width * 1.25) if width <= 1200 else (width, width)
    drawing = tag(
        "svg",
        tag("title", escape(heading), id=f"{name}-title"),
        tag("desc", escape(summary), id=f"{name}-desc"),
        *parts,
        id=name,
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        viewBox=f"0 0 {number(width)} {number(height)}",
        style=f"min-width:{number(least)}px;max-width:{number(most)}px",
    )
    return tag("div", drawing, class_="scroll", tabindex="0", role="group", aria_label=heading)


def fit(text: str, width: float, size: float) -> str:
    """As much of a text as is about `width` wide in a font of `size`, the middle left out."""
    room = int(width / (CHARACTER * size))
    if len(text) <= room:
        return text
    if room < 4:
        return text[: max(room - 1, 0)] + "…" if room > 1 else ""
    tail = (room - 1) // 2
    return f"{text[: room - 1 - tail]}…{text[len(text) - tail :]}"


def ticks(largest: float, about: int = 5) -> tuple[float, ...]:
    """Round numbers from 0 to the first that is not below `largest`, `about` steps."""
    if not largest > 0:
        return (0.0,)
    rough = largest / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    return tuple(step * i for i in range(math.ceil(largest / step * 0.999) + 1))


def byte_ticks(largest: float, about: int = 5) -> tuple[float, ...]:
    """`ticks` that are round in KiB, MiB, …"""
    unit = 1024.0 ** max(0, math.floor(math.log(largest, 1024))) if largest >= 1 else 1.0
    return tuple(t * unit for t in ticks(largest / unit, about))


def _value(value: object) -> object:
    return number(value) if isinstance(value, float) else value
