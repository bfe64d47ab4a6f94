"""`print(pipe.explain())`: the cut at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.passes.ir import at_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.planner import Plan


def table(plan: Plan) -> str:
    """A plan as text: the stages, what crosses between them, and what the schedule costs."""
    size, total = max(plan.sizes), sum(s.cost.seconds for s in plan.stages)
    rows = [["stage", "device", "calls", "parameters", "flops", "load", "sends"]]
    for stage in plan.stages:
        calls = sum(n.op == "call_function" for n in stage.graph_module.graph.nodes)
        sent = sum(at_batch(b.nbytes, size) for b in stage.outputs if b.targets)
        rows.append(
            [
                str(stage.index),
                str(stage.device),
                str(calls),
                nbytes(stage.cost.parameter_bytes),
                f"{at_batch(stage.cost.flops, size):.2e}",
                f"{stage.cost.seconds / total:.1%}" if total else "-",
                nbytes(sent),
            ]
        )
    samples = " or ".join(str(s) for s in sorted(set(plan.sizes), reverse=True))
    lines = [
        f"{len(plan.stages)} stages, {len(plan.sizes)} micro-batches of {samples},"
        f" schedule {plan.schedule}, remat {plan.remat}",
        *columns(rows),
        f"flops and bytes are those of a micro-batch of {size}; balance {plan.balance:.3f}"
        f" (mean load / largest), predicted bubble {plan.timeline.bubble:.1%}",
    ]
    crossing = {b.name: b for s in plan.stages for b in s.inputs if b.source is not None}
    if crossing:
        lines.append("between stages:")
    for boundary in crossing.values():
        once = " once a step" if boundary.kind == "parameter" else ""
        lines.append(f"  {boundary}  {nbytes(at_batch(boundary.nbytes, size))}{once}")
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def nbytes(count: int) -> str:
    """Bytes for people, in powers of 1024."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, each column as wide as it must be."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [line.rstrip() for line in lines]
