"""`pipe.memory` as it shows itself: a line, or a table in a notebook."""

from __future__ import annotations

from autopipe.formatting import format_bytes, notebook_table
from autopipe.runtime.memory import SavedBytesCounter

MOST_SHOWN = 4
"""Stages in a short text, at most."""


class PipelineMemory(SavedBytesCounter):
    """``pipe.memory``: the counters of a pipeline, with a short text."""

    def __repr__(self) -> str:
        """``PipelineMemory(stage 0: 0 B now, peak 16.0 KiB; …)``: a short line."""
        stages = (
            f"stage {k}: {now} now, peak {peak}" for k, now, peak, _ in self._rows()[:MOST_SHOWN]
        )
        more = f"; … {len(self.stages) - MOST_SHOWN} more" * (len(self.stages) > MOST_SHOWN)
        return f"{type(self).__name__}({'; '.join(stages)}{more})"

    def _repr_html_(self) -> str:
        caption = "Bytes saved between forward and backward"
        headings = ["stage", "now", "peak", "by samples in a micro-batch"]
        rows = [[*row] for row in self._rows()]
        if any(host.peak for host in self.hosts):
            headings.append("peak on the host")
            for row, host in zip(rows, self.hosts, strict=True):
                row.append(format_bytes(host.peak))
        return notebook_table(caption, headings, rows)

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [
            (
                str(k),
                format_bytes(stage.now),
                format_bytes(stage.peak),
                ", ".join(f"{n}: {format_bytes(b)}" for n, b in stage.per_microbatch.items()),
            )
            for k, stage in enumerate(self.stages)
        ]
