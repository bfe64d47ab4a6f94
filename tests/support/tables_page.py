"""docs/tables.md: what the tables of the code hold, for people who choose among options.

``python -m tests.support.tables_page > docs/tables.md`` writes the page anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autopipe.commands import all_commands
from autopipe.formatting import format_bytes
from autopipe.passes.capture.frontends import FRONTENDS
from autopipe.passes.devices import DEVICES
from autopipe.passes.ir.combine import REDUCTIONS
from autopipe.passes.kernels.table import SUBSTITUTES
from autopipe.passes.remat_policies import PARAMETERIZED, POLICIES
from autopipe.passes.schedule.kinds import KINDS
from autopipe.report.columns import STAGE_COLUMNS
from autopipe.runtime.backends import BACKENDS

HEAD = """\
# Tables

What users can choose from. This page is generated from the tables in the code
(`python -m tests.support.tables_page > docs/tables.md`); each section names the file to add to.
"""


def first_line(thing: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((thing.__doc__ or "").strip().split("\n\n")[0].split())


def section(title: str, file: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A section with one Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {title}\n\nIn `{file}`.\n\n{table}\n"


def page() -> str:
    """The whole page."""
    sections = [
        section(
            "Schedules",
            "passes/schedule/kinds.py",
            ["schedule", "what it does", "stages per device"],
            (
                [
                    f"`{k.name}`",
                    k.summary,
                    f"{k.virtual_stages}" + " (any)" * k.any_virtual_stages,
                ]
                for k in KINDS.values()
            ),
        ),
        section(
            "Rematerialization policies",
            "passes/remat_policies.py",
            ["remat", "what the backward recomputes"],
            [
                *([f"`{p.name}`", first_line(type(p))] for p in POLICIES),
                *([p.accepts, first_line(p.policy)] for p in PARAMETERIZED),
            ],
        ),
        section(
            "Device models",
            "passes/devices.py",
            ["device", "fp32 TFLOP/s", "fp16 TFLOP/s", "GB/s", "memory"],
            (
                [
                    f"`{d.name}`",
                    f"{d.fp32_flops / 1e12:g}",
                    f"{d.half_flops / 1e12:g}",
                    f"{d.gbytes_per_second:g}",
                    format_bytes(d.memory_bytes),
                ]
                for d in DEVICES.values()
            ),
        ),
        section(
            "Kernels of planned GPUs",
            "passes/kernels/table.py",
            ["operator", "what a plan for a GPU counts, wherever it is made"],
            (
                [f"`{op.overloadpacket.__name__}`", first_line(function)]
                for op, function in SUBSTITUTES.items()
            ),
        ),
        section(
            "Device types",
            "autopipe/runtime/backends/",
            ["type", "what it is"],
            ([f"`{b.type}`", first_line(type(b))] for b in BACKENDS.values()),
        ),
        section(
            "Models",
            "passes/capture/frontends.py",
            ["what may be passed as `model`"],
            ([f"`{f.name}`"] for f in FRONTENDS),
        ),
        section(
            "Reductions of results (`out_reduce`)",
            "passes/ir/combine.py",
            ["out_reduce", "how micro-batches combine"],
            ([f"`{c.name}`", first_line(type(c))] for c in REDUCTIONS.values()),
        ),
        section(
            "Columns of the table of stages",
            "autopipe/report/columns.py",
            ["column", "shown in"],
            ([c.heading, {"both": "text and page"}.get(c.shown, c.shown)] for c in STAGE_COLUMNS),
        ),
        section(
            "Commands",
            "autopipe/commands/",
            ["command", "what it does"],
            ([f"`autopipe {c.name}`", c.help] for c in all_commands()),
        ),
    ]
    return "\n".join([HEAD, *sections])


if __name__ == "__main__":
    print(page(), end="")
