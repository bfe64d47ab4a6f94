"""Cut one joint graph into the phases F, R, B and W by reachability.

    F  forward: what the stage's results and the new values of its buffers need
    R  recompute: what the backward needs, depends on no tangent, and F did not save
    B  backward: what the gradients of received values need; earlier stages wait for these
    W  weights: the rest, gradients of the stage's own parameters; no stage waits for these

The only choice is which values F saves; the stage's rematerialization policy makes it
(`select_saved`). An op that R recomputes is in the graph twice, so that every node belongs to one
phase.
"""

from __future__ import annotations

from operator import getitem
from typing import TYPE_CHECKING, Any

from torch import fx

from autopipe.passes._torch import storage_id_of
from autopipe.passes.ir import StageGraph, StagePhases, results_of

from .rematerialize import JointRewriter
from .select_saved import select_saved

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from autopipe.passes.remat_policies import RematPolicy

    from .joint_trace import JointGraph


def cut_joint(
    stage: StageGraph,
    joint: JointGraph,
    policy: RematPolicy,
    device: torch.device,
    *,
    exact: bool = True,
) -> StagePhases:
    """Cut one joint graph into F, R, B and W by reachability.

    Args:
        stage: the stage graph; gives the names.
        joint: its joint graph.
        policy: chooses what F saves.
        device: the device that it was traced for.
        exact: whether the stage sends the gradients of its copies of shared parameters to their
            owners with every micro-batch; False: it sums them itself.

    Returns:
        The cut stage, without names of tangents. In its draws, `call` is still a position in the
        stage graph, not in the captured graph.
    """
    ctx, *placeholders = [n for n in joint.graph.nodes if n.op == "placeholder"]
    names = stage.signature
    count = len(names) - len(stage.receives)
    state, rest = placeholders[:count], placeholders[count:]
    received, tangents = rest[: len(stage.receives)], rest[len(stage.receives) :]
    results = results_of(joint.graph)
    forward_results = len(stage.returns) + len(joint.updates)
    forward = _ancestors(results[:forward_results])
    forward |= {n for n in joint.graph.nodes if n.target is getitem and n.args[0] in forward}
    backward = _descendants(tangents)
    saved = set(received)
    if tangents:
        saved = select_saved(
            joint.graph, policy, forward, backward, state, received, forward_results
        )
    forward |= _ancestors(list(saved))
    written = [state[i] for i in joint.updates]
    written_storages = {storage_id_of(n) for n in written}
    saved = {n for n in saved if n in received or storage_id_of(n) not in written_storages}
    rewriter = JointRewriter(forward, backward, saved)
    rewriter.write_placeholders([ctx, *state], received, tangents, written)
    graph = rewriter.write_calls(joint.graph, results[:forward_results], results[forward_results:])
    summed = len(stage.held) if exact else count
    own_grads = tuple(names[i] for i in joint.grads if i < summed)
    awaited = _ancestors(results_of(graph)[forward_results + len(own_grads) :])
    return StagePhases(
        index=stage.index,
        graph=graph,
        phase_of=rewriter.phase_of
        | {n.name: "B" for n in awaited if rewriter.phase_of.get(n.name) == "W"},
        saved=tuple(rewriter.saved_names),
        state=tuple(names[:count]),
        receives=stage.receives,
        tangents=(),
        returns=stage.returns,
        updates=tuple(names[i] for i in joint.updates),
        own_grads=own_grads,
        sent_grads=tuple(names[i] for i in joint.grads if i >= summed),
        draws=joint.draws,
        device=device,
        conditions=joint.conditions,
    )


def _ancestors(results: Sequence[Any]) -> set[fx.Node]:
    """The ops and placeholders that `results` depend on, themselves included."""
    found: set[fx.Node] = set()
    todo = [r for r in results if isinstance(r, fx.Node)]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def _descendants(sources: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on `sources`, themselves included."""
    found: set[fx.Node] = set()
    todo = list(sources)
    while todo:
        node = todo.pop()
        if node not in found and node.op != "output":
            found.add(node)
            todo.extend(node.users)
    return found
