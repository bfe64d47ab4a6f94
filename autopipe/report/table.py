"""`print(pipe.explain())`: the cut at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.passes.ir import CALLER, at_batch
from autopipe.passes.schedule import schedule

from .stages import Boundary, views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.options import Options
    from autopipe.passes.ir import Split


def explain(split: Split, sizes: Sequence[int], options: Options) -> str:
    """A text table: stages, then what crosses between them, then the schedule in one line."""
    stages = views(split, sizes, options.devices)
    size, total = max(sizes), sum(s.cost.seconds for s in stages)
    rows = [["stage", "device", "calls", "parameters", "flops", "load", "sends"]]
    for stage in stages:
        calls = sum(n.op == "call_function" for n in stage.graph_module.graph.nodes)
        sent = sum(at_batch(b.nbytes, size) for b in stage.outputs if b.targets)
        rows.append(
            [
                str(stage.index),
                str(stage.device),
                str(calls),
                f"{nbytes(stage.cost.parameter_bytes)}",
                f"{at_batch(stage.cost.flops, size):.2e}",
                f"{stage.cost.seconds / total:.1%}" if total else "-",
                nbytes(sent),
            ]
        )
    balance = total / len(stages) / max(s.cost.seconds for s in stages) if total else 1.0
    chunks = len(sizes)
    waits = (len(stages) - 1) / (chunks + len(stages) - 1)
    scheduled = schedule(options.schedule, len(stages), chunks)
    lines = [
        f"{len(stages)} stages, {chunks} micro-batches of {_sizes(sizes)},"
        f" schedule {scheduled.kind}, remat {options.remat}",
        *_columns(rows),
        f"balance {balance:.3f} (mean load / largest); bubble (K-1)/(M+K-1) = {waits:.1%};"
        f" flops and bytes per micro-batch of {size}",
    ]
    crossing = [r for r in split.routes.values() if r.consumers and r.source != CALLER]
    if crossing:
        lines.append("between stages:")
        lines += [
            f"  {Boundary.of(r)}  {nbytes(at_batch(r.spec.nbytes, size))}"
            + (" once a step" if r.kind == "parameter" else "")
            for r in crossing
        ]
    lines += [f"note: {note}" for note in split.captured.notes]
    return "\n".join(lines)


def nbytes(count: int) -> str:
    """Bytes for people, in powers of 1024."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _sizes(sizes: Sequence[int]) -> str:
    return " or ".join(str(s) for s in sorted(set(sizes), reverse=True))


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 1 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [line.rstrip() for line in lines]
