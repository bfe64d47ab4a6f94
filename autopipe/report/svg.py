"""Drawing primitives: text, escaped; elements as strings; round numbers for axes.

Names in a plan come from a file, so they are untrusted: all text goes through `escape`, and every
element through `tag`.
"""

from __future__ import annotations

import html
import math
import re

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)
"""Characters that XML forbids, those that change the direction of text, and invisible ones."""

CHARACTER = 0.56
"""Mean width of a character in units of the font size, a little above that of common fonts."""


def escape(text: object) -> str:
    """Escape text for an element or a quoted attribute; invisible characters become U+FFFD."""
    return html.escape(_UNSEEN.sub("\ufffd", str(text)), quote=True)


def tag(name: str, /, *content: str, **attributes: object) -> str:
    """Write an element.

    Args:
        name: of the element.
        content: its children: elements, or escaped text.
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
    """Format a coordinate with at most two decimals and no trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def rect(x: float, y: float, width: float, height: float, class_: str, *content: str) -> str:
    """A rectangle; `content` is a `title`, or nothing."""
    return tag("rect", *content, class_=class_, x=x, y=y, width=width, height=height)


def label(x: float, y: float, content: object, class_: str = "", anchor: str | None = None) -> str:
    """A line of text; `anchor` is "middle" or "end"."""
    return tag("text", escape(content), x=x, y=y, class_=class_ or None, text_anchor=anchor)


def title(content: object) -> str:
    """The tooltip of the element that contains it."""
    return tag("title", escape(content))


def figure(name: str, heading: str, summary: str, width: float, height: float, *parts: str) -> str:
    """A drawing with its title and description, in a box that scrolls where the page is narrow.

    Args:
        name: part of its ids; unique on the page.
        heading, summary: title and description for screen readers.
        parts: the elements of the drawing.
        width, height: of the drawing, in its own units (pixels if it fits the page).
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
    """Shorten a text in its middle so that it is about `width` wide in a font of `size`."""
    count = int(width / (CHARACTER * size))
    if len(text) <= count:
        return text
    if count < 4:
        return text[: max(count - 1, 0)] + "…" if count > 1 else ""
    tail = (count - 1) // 2
    return f"{text[: count - 1 - tail]}…{text[len(text) - tail :]}"


def ticks(largest: float, about: int = 5) -> tuple[float, ...]:
    """Round numbers for an axis, from 0 to at least `largest`, in about `about` equal steps."""
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
