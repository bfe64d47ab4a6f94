"""`print(pipe.explain())`: the cut at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .svg import seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.planning.plans import Plan


def table(plan: Plan) -> str:
    """A plan as text: the stages, what crosses between them, and what the schedule costs."""
    size, total = max(plan.sizes), sum(s.seconds for s in plan.stages)
    mixed = len({s.remat for s in plan.stages}) > 1
    heads = ["stage", "device", "calls", "parameters", "flops", "load", "sends", "saves", "memory"]
    rows = [[*heads, "remat"] if mixed else heads]
    for k, stage in enumerate(plan.stages):
        sent = sum(c.nbytes for c in plan.crossings if c.source == k)
        limit = stage.limit_bytes
        rows.append(
            [
                str(k),
                stage.device,
                str(stage.calls),
                nbytes(stage.parameter_bytes),
                f"{stage.flops:.2e}",
                f"{stage.seconds / total:.1%}" if total else "-",
                nbytes(sent),
                f"{stage.in_flight} × {nbytes(stage.saved_bytes)}",
                nbytes(stage.memory_bytes) + (f" of {nbytes(limit)}" if limit is not None else ""),
                *[stage.remat] * mixed,
            ]
        )
    samples = " or ".join(str(s) for s in sorted(set(plan.sizes), reverse=True))
    bound = "" if plan.gap is None else f"; no cut is more than {plan.gap:.1%} better"
    gathering = (
        f" ({seconds(plan.gather_seconds)} to gather results)" if plan.gather_seconds else ""
    )
    lines = [
        f"{len(plan.stages)} stages, {len(plan.sizes)} micro-batches of {samples},"
        f" schedule {plan.schedule}, remat {plan.remat}",
        *columns(rows),
        f"flops and bytes are those of a micro-batch of {size}, memory is all that a device needs;"
        f" balance {plan.balance:.3f} (mean load / largest{bound})",
        f"predicted step {seconds(plan.step_seconds)}{gathering}, bubble {plan.timeline.bubble:.1%}"
        f" (times: {', '.join(dict.fromkeys(s.speeds for s in plan.stages))})",
    ]
    crossing = [c for c in plan.crossings if c.source is not None]
    if crossing:
        lines.append("between stages:")
    for one in crossing:
        once = " once a step" if one.kind == "parameter" else ""
        lines.append(f"  {one}  {nbytes(one.nbytes)}{once}")
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
