"""Find how every value depends on the batch, and how micro-batch results become the batch's.

In: a captured, normalized graph with the batch dimensions of its inputs.
Out: the state of every node, and a `CombinedGraph`: outputs with rules of combination (`Combine`),
and an epilogue that runs once per step on the whole batch's values.

Files, in reading order:

    `lattice`             the states of a value
    `op_call`             one op, and how its operands' states join
    `propagate`           state of every node, in one pass over the graph
    `rules_shape`         rules for views and ops along dimensions; the table of rules
    `rules_join`          rules for slicing, concatenating, repeating
    `rules_new`           rules for ops that create tensors
    `rules_index`         rules for indexing
    `rules_math`          rules for arithmetic, reductions, products
    `rules_layers`        rules for convolutions, norms, pooling, embeddings
    `rules_losses`        rules for losses
    `slicing`             slice values by samples, and join the slices
    `index_ranges`        operands that are indices, and the sizes of what they index
    `sample_run`          one run of the graph, on samples and on slices of them
    `comparisons`         make comparisons active that are the same everywhere
    `trial_inputs`        draw other inputs and parameters for a trial
    `numeric_trial`       decide open states by running the graph on a few samples
    `backward_trial`      the same for the backward of custom autograd.Functions
    `decide_states`       whether a trial is needed, and what it decided
    `shares`              check in every step that samples take their own entries of a source
    `partial_reductions`  reductions rewritten as sums per micro-batch
    `epilogue`            the graph that runs once per step
    `epilogue_cut`        the captured graph cut at its batch reductions
    `combine_outputs`     a rule of combination for every result
"""

from __future__ import annotations

from .combine_outputs import CombinedGraph, combine
from .decide_states import decide_by_trial
from .lattice import STATIC, Reduced
from .propagate import propagate_states

__all__ = [
    "STATIC",
    "CombinedGraph",
    "Reduced",
    "combine",
    "decide_by_trial",
    "propagate_states",
]
