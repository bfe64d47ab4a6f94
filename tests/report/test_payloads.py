"""Code in every text of a plan: on the page it is text, and no element or attribute is made of it.

Covers report/svg.py and report/page.py: what a file of somebody else's can do to who looks at it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from autopipe.errors import OptionError
from autopipe.report.page import page
from autopipe.report.svg import escape
from tests.support.plans import made_plan, whole_plan

MARK = "zq7"
"""In every payload, and nowhere else on a page."""

PAYLOADS = [
    f"<script>{MARK}()</script>",
    f'"><img src=x onerror={MARK}()>',
    f"'><svg onload={MARK}()>",
    f'" onmouseover="{MARK}()" x="',
    f"' onfocus='{MARK}()' autofocus='",
    f"</title></style></script></textarea><iframe src=//{MARK}></iframe>",
    f"</code></td></tr></table></main><a href='javascript:{MARK}()'>click</a>",
    f"<![CDATA[<b>{MARK}</b>]]><!--{MARK}--><?{MARK} ?><!DOCTYPE {MARK}>",
    f"--><base href=//{MARK}><meta http-equiv=refresh content='0;//{MARK}'>",
    f"&lt;b&gt;{MARK}&#60;img src=x&#62;&#x3cb&#x3e;&amp;lt;i&amp;gt;",
    f"<\x00script>{MARK}</\x00script\x0c><\x0bimg/onerror={MARK}>",
    f"</style><style>@import '//{MARK}'; * {{background: url(//{MARK})}}",
    f"`${{{MARK}}}`{{{{{MARK}}}}}<%={MARK}%>",
    f"\u202e\u2066<\ufeffb {MARK}>\ud800\u2028\u200f<u>{MARK}\x85\x9b",
    f"ＩＭＧ＜script＞{MARK}＜/script＞<ſcript {MARK}><İMG {MARK}>",
]


class Structure(HTMLParser):
    """A page as browsers read it: what it is made of, and where the mark stands."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.made: list[tuple[str, ...]] = []
        self.texts = 0
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.made.append((tag, *(name for name, _ in attrs)))
        assert MARK not in tag
        for name, value in attrs:
            assert MARK not in name + (value or "")
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        self.made.append((f"/{tag}",))
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts += data.count(MARK)
        assert MARK not in data or self.open[-1] in {
            *("code", "td", "th", "li", "p", "h1", "title", "text", "desc", "summary")
        }

    def other(self, data: str) -> None:
        self.made.append(("other", data))

    handle_comment = handle_decl = handle_pi = unknown_decl = other


def places(value: Any, inside: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all texts of a plan."""
    if isinstance(value, str):
        yield inside
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from places(part, (*inside, i))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from places(getattr(value, field.name), (*inside, field.name))


def put(value: Any, at: tuple[Any, ...], text: str) -> Any:
    """The same with a text in one place."""
    if not at:
        return text
    if isinstance(value, tuple):
        return tuple(put(v, at[1:], text) if i == at[0] else v for i, v in enumerate(value))
    return dataclasses.replace(value, **{at[0]: put(getattr(value, at[0]), at[1:], text)})


PLACES = [at for at in places(whole_plan()) if at != ("schedule",)]


def test_the_texts_of_a_plan_are_found() -> None:
    assert len(PLACES) >= 43
    assert {("model",), ("notes", 1), ("stages", 2, "parameters", 1)} <= {*PLACES}


def harmless(payload: str) -> str:
    """A text of letters, as long as the payload."""
    return "n" * len(payload)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize(
    "step", [9, pytest.param(1, marks=pytest.mark.full)], ids=["some places", "each place"]
)
def test_code_in_one_place_makes_nothing(payload: str, step: int) -> None:
    """The page is made of the same elements as with letters there."""
    shown = 0
    for at in PLACES[PAYLOADS.index(payload) % step :: step]:
        found = Structure(page(put(whole_plan(), at, payload)))
        assert found.made == Structure(page(put(whole_plan(), at, harmless(payload)))).made
        shown += found.texts
    assert shown > 0


@pytest.mark.parametrize("payload", PAYLOADS)
def test_code_in_all_places_makes_nothing(payload: str) -> None:
    plan, plain = whole_plan(), whole_plan()
    for i, at in enumerate(PLACES):
        plan, plain = put(plan, at, f"{i}{payload}"), put(plain, at, f"{i}{harmless(payload)}")
    text = page(plan)
    found = Structure(text)
    assert found.made == Structure(page(plain)).made
    assert found.texts > 20
    assert {c for c in text if not c.isprintable()} <= {"\n", "\ufffd"}
    text.encode()  # no lone surrogate is left


@pytest.mark.parametrize("payload", PAYLOADS)
def test_code_in_the_name_of_the_schedule_is_a_plain_error(payload: str) -> None:
    with pytest.raises(OptionError, match="unknown schedule") as caught:
        page(put(whole_plan(), ("schedule",), payload))
    assert {c for c in str(caught.value) if not c.isprintable()} <= {"\n"}


def test_the_parser_would_see_what_got_in() -> None:
    """The checks above can fail."""
    text = page(made_plan())
    for wrong in (f"<b>{MARK}</b>", "<b></b>", "<!-- a comment -->"):
        broken = text.replace("</main>", f"{wrong}</main>")
        with pytest.raises(AssertionError):
            assert Structure(broken).made == Structure(text).made
    with pytest.raises(AssertionError):
        Structure(text.replace("<main", f'<main class="{MARK}"'))


UNSEEN = (
    "\x00\x08\x1b\x7f\x85\x9b\xad\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202e\u2060\u2066\u2069"
    "\ufeff\ufffe\uffff\ud800\udfff\U000e0041"
)


@pytest.mark.parametrize("c", UNSEEN, ids=ascii)
def test_what_cannot_be_seen_is_replaced(c: str) -> None:
    assert escape(f"a{c}b") == "a\ufffdb"


def test_words_in_other_scripts_stay() -> None:
    assert escape("größe 模型 שלום 🙂\n\t") == "größe 模型 שלום 🙂\n\t"
