"""Columns of tables: what is shown where, and that a column is one entry.

Covers report/plan_text.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopipe.planning.plan_parts import Times
from autopipe.planning.plans import Plan
from autopipe.report import columns, page_tables, plan_text
from autopipe.report.columns import STAGE_COLUMNS, Column, columns_of, stage_rows
from autopipe.report.page import page
from autopipe.report.page_data import PageData
from tests.support.pages import Page
from tests.support.plans import made_plan

PLAN = made_plan(3, (4, 4, 3), limit=2**20)
MIXED = replace(PLAN, stages=(replace(PLAN.stages[0], remat="none"), *PLAN.stages[1:]))


READ = {"stage", "device", "calls", "parameters", "flops", "load", "sends", "saves", "memory"}
READ |= {"remat"}
"""The columns whose texts are read here; the table may have more."""


def test_the_text_has_a_column_for_policies_only_if_they_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = tuple(c for c in STAGE_COLUMNS if c.heading in READ)
    monkeypatch.setattr(plan_text, "STAGE_COLUMNS", known)
    assert plan_text.plan_text(PLAN).splitlines()[1:5] == [
        "stage  device  calls  parameters     flops   load    sends        saves"
        "               memory",
        "    0  cpu         3     4.0 KiB  1.00e+06  22.2%    512 B   3 × 1000 B"
        "  16.9 KiB of 1.0 MiB",
        "    1  cpu         4     8.0 KiB  2.00e+06  33.3%  1.0 KiB  3 × 2.0 KiB"
        "  32.0 KiB of 1.0 MiB",
        "    2  cpu         5    12.0 KiB  3.00e+06  44.4%      0 B  3 × 2.9 KiB"
        "  47.0 KiB of 1.0 MiB",
    ]
    lines = plan_text.plan_text(MIXED).splitlines()
    assert [line.split()[-1] for line in lines[1:5]] == ["remat", "none", "full", "full"]


def test_the_page_has_its_columns() -> None:
    found = Page(page_tables.stage_table(PageData(PLAN)))
    heads = [e.text for e in found.named("th") if e.attributes.get("scope") == "col"]
    assert heads == [c.heading for c in columns_of(STAGE_COLUMNS, stage_rows(PLAN), "page")]
    assert len(found.named("td")) == 3 * (len(heads) - 1)


@pytest.mark.parametrize("shown", ["text", "page", "both"])
def test_a_column_is_one_entry(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = Column[columns.StageRow](
        "gradients <g>",
        lambda row: f"<{row.stage.gradient_bytes}>",
        shown=shown,  # type: ignore[arg-type]
    )
    for module in (plan_text, page_tables):
        monkeypatch.setattr(module, "STAGE_COLUMNS", (*STAGE_COLUMNS, more))
    text, page = plan_text.plan_text(PLAN), Page(page_tables.stage_table(PageData(PLAN)))
    assert ("gradients <g>" in text and "<8192>" in text) == (shown != "page")
    cells = [e.text for e in page.elements if e.name in ("th", "td")]
    assert ("gradients <g>" in cells and "<8192>" in cells) == (shown != "text")


# ------------------------------------------------------------------------------- short texts


def on(speeds: str, device: str = "cpu") -> Plan:
    stages = tuple(replace(s, speeds=speeds, device=device) for s in PLAN.stages)
    return replace(PLAN, stages=stages)


@pytest.mark.parametrize(
    ("speeds", "device", "shown"),
    [
        ("cpu-core", "cpu", "cpu"),
        ("h100", "cpu", "h100"),
        ("h100", "cuda:0", "cuda:0 (h100)"),
        ("measured on a CPU", "cpu", "cpu"),
    ],
)
def test_the_column_names_the_planned_device(speeds: str, device: str, shown: str) -> None:
    plan = on(speeds, device)
    assert {row.stage.planned_device for row in stage_rows(plan)} == {shown}
    assert all(shown in line for line in plan_text.plan_text(plan).splitlines()[2:5])


def test_times_have_the_digits_that_they_deserve() -> None:
    """Three where they were measured, two where a data sheet gives them."""
    assert " 53 ms" in plan_text.plan_text(replace(PLAN, sizes=(4, 4)))
    measured = replace(on("measured on a CPU"), sizes=(4, 4))
    assert " 53.5 ms" in plan_text.plan_text(measured)


def test_idle_devices_are_advised_against() -> None:
    assert PLAN.advice == ()
    little = replace(
        PLAN.stages[1], times=tuple(Times(1e-6, 0, 0, 0, 0, 0) for _ in PLAN.stages[1].times)
    )
    plan = replace(PLAN, stages=(PLAN.stages[0], little, PLAN.stages[2]))
    (advice,) = plan.advice
    assert advice.startswith("stage 1 works less than 10%")
    assert advice.endswith("use fewer devices (2)")
    assert f"advice: {advice}" in plan_text.plan_text(plan).splitlines()
    assert advice in [e.text for e in Page(page(plan)).named("li")]
    assert advice.replace("<", "&lt;") in plan._repr_html_()
    nothing = tuple(replace(s, times=(Times(*[0.0] * 6),) * 2) for s in PLAN.stages)
    assert replace(PLAN, stages=nothing).advice == ()


def test_a_plan_in_a_notebook_is_short_and_escaped() -> None:
    hostile = replace(PLAN, model="<b>\x1b")
    assert "\n" not in repr(hostile)
    assert len(repr(hostile)) < 150
    assert "\x1b" not in repr(hostile) + hostile._repr_html_()
    found = Page(PLAN._repr_html_())
    assert [e.text for e in found.named("th")] == [*plan_text.NOTEBOOK]
    assert len(found.named("tr")) == 1 + len(PLAN.stages)
    assert "<b>" not in hostile._repr_html_()
