"""Record what a phase launches on a device once, and replay it by one call: CUDA graphs.

Launching an operator costs the host some microseconds, and one process launches the operators of
all devices. A captured phase is one launch, whatever it computes.

A graph reads and writes the same memory whenever it is replayed. So each micro-batch that a stage
has in flight takes a `Slot`, which has graphs of its own, with memory of its own for what is saved
between them. No saved value is copied. What the phase receives is copied in, and what it sends
is copied out, so that nothing outside of a slot depends on how long its memory stays as it is.
Gradients are summed in memory that stays (`KeptSums`).

    action(run, m, compute) ──▶ StageGraphs ──▶ 1st run: eager, `Observed`
                                     │          later: PhaseGraph of a Slot: captured, or replayed
                                     └────────▶ what cannot be captured: eager, with the reason

Read in this order:

    `observed`      an eager run of a phase shows what a graph needs, or why there can be none
    `phase_graph`   one captured phase
    `stage_state`   parameters and buffers: those that stay where they are, those that do not
    `kept_sums`     sums of gradients in memory that stays
    `slots`         which micro-batch has which memory
    `stage_graphs`  the graphs of one stage in one program
"""

from __future__ import annotations

from .stage_graphs import GraphedStage, StageGraphs

__all__ = ["GraphedStage", "StageGraphs"]
