"""The report page: well formed, closed to the world, complete; every name in it is only text.

Covers report/page_tables.py and report/style.py.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from autopipe.errors import PlanError
from autopipe.planning.plan_parts import Times
from autopipe.planning.plans import Plan
from autopipe.report.memory_view import PipelineMemory
from autopipe.report.page import POLICY, page
from autopipe.report.svg import escape
from tests.support.measuring import made_measured
from tests.support.pages import Page
from tests.support.plans import crossing, made_plan

LONG = "encoder." + "x" * 192
NASTY = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style></svg><b>&amp;",
    "a\x00b\x1fc\u202ed\ud800e",
    "' onload='x",
]


def nasty() -> Plan:
    """A plan whose every text is hostile."""
    sent = [crossing(NASTY[k], k - 1 if k else None, 3) for k in range(4)]
    sent += [crossing(NASTY[4], 0, 1, kind="parameter"), crossing(NASTY[0], 0, 1)]
    plan = made_plan(4, crossings=sent, model=NASTY[0], notes=tuple(NASTY))
    stages = tuple(
        dataclasses.replace(s, first=f"{k}{NASTY[k]}", device=NASTY[0], parameters=tuple(NASTY))
        for k, s in enumerate(plan.stages)
    )
    return dataclasses.replace(plan, stages=stages, graph=NASTY[1])


def skips() -> Plan:
    """A U-Net's: each stage of the first half sends to its mirror, one value to all."""
    K = 8
    sent = [crossing("x", None, 0), crossing("t", None, *range(K)), crossing("y", None, K - 1)]
    sent += [crossing(f"h{k}", k, k + 1, nbytes=5000 * (k + 1)) for k in range(K - 1)]
    sent += [crossing(f"skip{k}", k, K - 1 - k, nbytes=9000) for k in range(3)]
    sent += [crossing("wte", 0, K - 1, kind="parameter"), crossing("g", 2, 3, kind="parameter")]
    return made_plan(K, (2,) * 6, sent)


PLANS = {
    "1 stage": lambda: made_plan(1, (1,), []),
    "2 stages": lambda: made_plan(2, (3, 3, 2)),
    "64 stages": lambda: made_plan(64, (1, 1)),
    "256 micro-batches": lambda: made_plan(2, (2,) * 256),
    "1f1b": lambda: made_plan(4, (2,) * 12, schedule="1f1b", remat="none"),
    "no time": lambda: dataclasses.replace(
        made_plan(2),
        stages=tuple(
            dataclasses.replace(s, times=(Times(0.0, 0.0, 0.0, 0.0, 0.0, 0.0),) * len(s.times))
            for s in made_plan(2).stages
        ),
    ),
    "skips": skips,
    "long names": lambda: made_plan(
        3, (1,), [crossing(LONG, None, 0), crossing(LONG, 0, 1, 2)], model=LONG
    ),
    "nasty": nasty,
}
each_plan = pytest.mark.parametrize("plan", [make() for make in PLANS.values()], ids=PLANS)


@each_plan
def test_it_is_well_formed_and_its_drawings_are_xml(plan: Plan) -> None:
    found = Page(page(plan))
    names = [e.attributes["id"] for e in found.elements if "id" in e.attributes]
    assert len(set(names)) == len(names)
    drawings = {str(e.attributes["id"]) for e in found.named("svg")}
    assert drawings >= {"graph", "times", "memory", "timeline"}
    for name in drawings:
        drawing = found.svg(name)
        assert drawing.get("role") == "img"
        labels = (drawing.get("aria-labelledby") or "").split()
        assert [e.get("id") for e in drawing[:2]] == labels  # its title and description
        assert all(e.text for e in drawing[:2])


@each_plan
def test_coordinates_are_finite_and_within_the_drawing(plan: Plan) -> None:
    for drawing in map(Page(page(plan)).svg, ("graph", "times", "memory", "timeline")):
        *_, width, height = map(float, (drawing.get("viewBox") or "").split())
        for box in drawing.iter("rect"):
            x, y, w, h = (float(box.get(a) or "nan") for a in ("x", "y", "width", "height"))
            assert 0 <= x <= x + w <= width + 0.02
            assert 0 <= y <= y + h <= height
        for text in drawing.iter("text"):
            assert 0 <= float(text.get("x") or "nan") <= width
            assert 0 <= float(text.get("y") or "nan") <= height


@each_plan
def test_nothing_is_loaded_or_run(plan: Plan) -> None:
    found = Page(page(plan))
    assert {e.name for e in found.elements} & {
        *("script", "link", "img", "iframe", "object", "embed", "image", "use", "foreignobject"),
        *("base", "form", "a", "video", "audio", "b"),
    } == set()
    for element in found.elements:
        for name in element.attributes:
            assert not name.startswith("on")
            assert name not in ("src", "href", "xlink:href", "srcset", "action", "background")
    (style,) = found.named("style")
    assert not re.search(r"url\(|@import|expression|https?:", style.text)
    (policy,) = [e for e in found.named("meta") if "http-equiv" in e.attributes]
    assert (policy.attributes["content"] or "").startswith("default-src 'none';")


def test_names_are_text(tmp_path: Path) -> None:
    text = page(nasty())
    found = Page(text)
    codes = {e.text for e in found.named("code")}
    assert {NASTY[0], NASTY[1], NASTY[2], NASTY[4], "a\ufffdb\ufffdc\ufffdd\ufffde"} <= codes
    assert found.named("h1")[0].text == NASTY[0]
    assert {e.text for e in found.named("li")} >= {NASTY[1], NASTY[2]}
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")  # no lone surrogates are left
    assert Page(path.read_text(encoding="utf-8")).named("h1")


@each_plan
def test_every_stage_and_every_tensor_is_named(plan: Plan) -> None:
    found = Page(page(plan))
    codes = [e.text for e in found.named("code")]
    rows = [e for e in found.named("table") if e.text.startswith("Stages.")]
    assert len(rows) == 1
    drawn = [e for e in found.named("g") if e.classes == {"stage"}]
    assert [e.attributes["data-stage"] for e in drawn] == [str(k) for k in range(len(plan.stages))]
    if plan.model != NASTY[0]:  # there unseen characters are replaced
        for name in [s.modules for s in plan.stages] + [c.name for c in plan.crossings]:
            assert name in codes
        for stage in plan.stages:
            assert set(stage.parameters) <= set(codes)


def test_tables_say_in_words_what_is_drawn() -> None:
    plan = made_plan(3, (4, 4))
    found = Page(page(plan))
    captions = [e.text for e in found.named("caption")]
    assert len(captions) == len(found.named("table")) == 5
    heads = found.named("th")
    assert all(e.attributes.get("scope") in ("col", "row") for e in heads)
    cells = [e.text for e in found.named("td")]
    assert "3 ms" in cells  # stage 1 forward
    assert "7.5 ms" in cells  # stage 1 backward
    assert "33.3%" in cells  # stage 1: 3 of 2 + 3 + 4
    tiles = dict(
        zip([e.text for e in found.named("dt")], [e.text for e in found.named("dd")], strict=True)
    )
    assert tiles["stages"].startswith("3")
    assert tiles["balance"].startswith("0.750")  # 3 of 4
    # GPipe: three forwards of 2 + 3 + 4, one more of 4, then backwards of 3.5 times 4, twice;
    # stages 1 and 0 have recomputed before: 2.5 times 3, and times 2
    assert tiles["step time"].startswith("53 ms")  # times of a table deserve two digits


def changed(forward: float = 0.0, backward: float = 0.0, **facts: object) -> Plan:
    plan = made_plan()
    times = (Times(forward, 0.0, backward, 0.0, 0.0, 0.0),) * 2
    first = dataclasses.replace(plan.stages[0], times=times, **facts)  # type: ignore[arg-type]
    return dataclasses.replace(plan, stages=(first, *plan.stages[1:]))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (changed(forward=1e308, backward=1e308), "times cannot be drawn"),
        (changed(forward=1e16), "times cannot be drawn"),
        (changed(flops=10**400), r"stages\[0\].flops"),
        (changed(parameter_bytes=2**64), r"stages\[0\].parameter_bytes"),
        (made_plan(2, crossings=[crossing("h", 0, 1, nbytes=2**64)]), "'h'"),
        (made_plan(2, (2**64,)), "sizes"),
    ],
)
def test_numbers_without_a_place_in_a_drawing_are_refused(plan: Plan, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        page(plan)


@pytest.mark.parametrize("seconds", [1e-300, 1e-9, 1e12])
def test_numbers_at_the_edge_are_drawn(seconds: float) -> None:
    plan = changed(forward=seconds, flops=2**64 - 1, parameter_bytes=2**64 - 1)
    for name in ("times", "memory", "timeline", "chunks"):
        drawing = Page(page(plan)).svg(name)
        for element in drawing.iter():
            for value in element.attrib.values():
                assert not re.search(r"\b(nan|inf)\b", value)


# ------------------------------------------------------------------------------------- a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CONSOLE = re.compile(r"CONSOLE[:(]\d+.*")


def opened(path: Path, folder: Path, *options: str) -> tuple[str, list[str]]:
    """The document as headless Chromium has it, and what it wrote to the console."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *(*options, f"--user-data-dir={folder}", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, CONSOLE.findall(done.stderr)


MEASURE = """<script>
const wide = [...document.querySelectorAll("table, .scroll:has(table)")].filter(
    e => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth);
document.body.dataset.clipped = wide.length;
document.body.dataset.tables = document.querySelectorAll("table").length;
document.body.dataset.width = innerWidth;
</script>"""


def clipped(html: str, tmp_path: Path) -> list[str]:
    """(tables that are clipped, tables, width) as the browser measures them in a narrow window."""
    path = tmp_path / "page.html"
    open_tables = html.replace("<details>", "<details open>").replace(escape(POLICY), "")
    path.write_text(open_tables + MEASURE, encoding="utf-8")
    document, _ = opened(path, tmp_path / "profile", "--window-size=500,2000")
    return [re.findall(f'data-{n}="(\\d+)"', document)[-1] for n in ("clipped", "tables", "width")]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_no_table_is_clipped_in_a_narrow_window(tmp_path: Path) -> None:
    assert clipped(page(skips()), tmp_path) == ["0", "5", "500"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_no_table_of_a_notebook_is_clipped(tmp_path: Path) -> None:
    plan = skips()
    counter = PipelineMemory(range(8))
    counter.stages[0].per_microbatch = {n: 2**n for n in range(20, 40)}
    html = plan._repr_html_() + counter._repr_html_()
    assert clipped(f"<!DOCTYPE html><body>{html}", tmp_path) == ["0", "2", "500"]


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("plan", [skips(), nasty()], ids=["skips", "nasty"])
def test_a_browser_has_nothing_to_complain_of(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(plan), encoding="utf-8")
    document, console = opened(path, tmp_path / "profile")
    assert console == []
    here = Page(path.read_text(encoding="utf-8"))
    assert document.count("<svg") == len(here.named("svg")) == 5
    assert document.count("<rect") == len(here.named("rect"))


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_script_that_got_in_would_not_run_and_would_be_seen(tmp_path: Path) -> None:
    """The policy holds, and the console is really read: the check above can fail."""
    path = tmp_path / "page.html"
    broken = page(made_plan()).replace("</main>", "</main><script>document.title = 'ran'</script>")
    path.write_text(broken, encoding="utf-8")
    document, console = opened(path, tmp_path / "profile")
    assert "Content Security Policy" in "".join(console)
    assert "<title>ran" not in document


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_no_table_of_measured_steps_is_clipped(tmp_path: Path) -> None:
    plan = skips()
    seconds = [{"F": 0.002, "RBW": 0.006}] * 8
    assert clipped(page(plan, made_measured(plan, [seconds])), tmp_path) == ["0", "8", "500"]
