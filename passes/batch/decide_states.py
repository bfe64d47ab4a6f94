"""Decide the states that the rules leave open: by a numeric trial, if the model has weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from autopipe.passes.graph import source_line

from .lattice import Mixed
from .numeric_trial import NumericTrial, candidate_states
from .propagate import propagate_states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from autopipe.passes.ir import Input


def decide_by_trial(
    graph: fx.Graph,
    inputs: Sequence[Input],
    states: dict[fx.Node, Any],
    results: Iterable[fx.Node],
    tensor: Callable[[Input], Tensor],
) -> tuple[dict[fx.Node, Any], list[str]]:
    """Run a trial if the states of the `results` are undecided.

    Args:
        graph: normalized.
        inputs: its placeholders.
        states: as found by `propagate_states`.
        results: the nodes whose states matter.
        tensor: returns a placeholder's value. If one is on the meta device, nothing can be run:
            samples are then assumed to stay independent where the rules cannot decide.

    Returns:
        The states, and a note for each op that the trial decided.
    """
    if not any(isinstance(s := states.get(n), Mixed) and not s.proven for n in results):
        return states, []
    values = {i.name: tensor(i) for i in inputs}
    trial: AssumeApart | NumericTrial = AssumeApart()
    if not any(t.is_meta for t in values.values()):
        traced = {n.name: n.meta["val"].device for n in graph.nodes if n.op == "placeholder"}
        trial = NumericTrial(graph, inputs, lambda i: values[i.name].to(traced[i.name]))
    with torch.no_grad(), torch.random.fork_rng():
        states = propagate_states(graph, inputs, trial)
    return states, [
        f"{n.name} ({source_line(n) or n.target}) {what}" for n, what in trial.decided.items()
    ]


class AssumeApart:
    """A trial for models without weights: assumes that samples stay independent.

    Attributes:
        decided: node where samples may have mixed → what was assumed, for a note.
    """

    def __init__(self) -> None:
        self.decided: dict[fx.Node, str] = {}

    def step(self, node: fx.Node, state: Any, states: dict[fx.Node, Any]) -> Any:
        """Decide a node's state; see `NodeTrial`."""
        if not isinstance(state, Mixed) or state.proven:
            return state
        for found in candidate_states(node):
            self.decided[state.node] = "was not tried, the model has no weights"
            return found
        return state
