"""Extract stage graphs with explicit signatures, and the routes of values between them.

Sizes are not sent: each stage reads the batch size, and lengths, off the shapes of its tensors.
"""

from __future__ import annotations

from collections import defaultdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from autopipe.passes.graph import (
    emit_size,
    emit_symbol,
    fingerprint,
    graph_module,
    is_size,
    readable_symbols,
    size_symbols,
    tensor_spec,
)
from autopipe.passes.ir import (
    CALLER,
    Annotated,
    Input,
    InputKind,
    Route,
    Split,
    StageGraph,
    results_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.passes.ir import StageEstimates

    from .stage_estimate import Assignment


def extract_stages(
    annotated: Annotated,
    assignment: Assignment,
    estimates: StageEstimates,
    owners: Mapping[str, int] = MappingProxyType({}),
) -> Split:
    """Extract the stages of an assignment.

    Args:
        annotated: the program, in an order in which each stage is a contiguous run, duplicates
            aside.
        assignment: the stages of each op.
        estimates: of the K stages.
        owners: parameter → the stage that owns it, which is not after the first that uses it. The
            others belong to the first that uses them.
    """
    captured, K = annotated.captured, len(estimates.seconds)
    inputs = {i.name: i for i in captured.inputs}
    users = _users(captured.graph_module.graph, assignment)
    outputs = {o.name: i for i, o in enumerate(captured.outputs)}
    routes: dict[str, Route] = {}
    held: dict[int, list[Input]] = defaultdict(list)
    shared: dict[int, list[str]] = defaultdict(list)
    receives: dict[int, list[str]] = defaultdict(list)
    returns: dict[int, list[str]] = defaultdict(list)
    for node, needed in users.items():
        item = inputs.get(node.name)
        stages = sorted(needed)
        if item is not None and item.kind in (InputKind.BUFFER, InputKind.CONSTANT):
            for k in stages:  # readers only: writes stay in one stage (`op_groups`)
                held[k].append(item)
            continue
        if item is None:
            source, kind = assignment[node][0], "activation"
            consumers = [k for k in stages if k not in assignment[node]]
            if not consumers and node.name not in outputs:
                continue
            returns[source].append(node.name)
        elif item.kind is InputKind.PARAMETER:
            source = min(stages[0], owners.get(item.target, stages[0]))
            kind, consumers = "parameter", [k for k in stages if k != source]
            held[source].append(item)
            if not consumers:
                continue
        else:
            source, kind, consumers = CALLER, "input", stages
        routes[node.name] = Route(
            tensor_spec(node), kind, source, tuple(consumers), outputs.get(node.name)
        )
        for k in consumers:
            (shared if kind == "parameter" else receives)[k].append(node.name)
    by_name: dict[str, fx.Node] = {}
    ops: dict[int, list[tuple[int, fx.Node]]] = defaultdict(list)
    for position, node in enumerate(captured.graph_module.graph.nodes):
        by_name[node.name] = node
        for k in assignment.get(node, ()):
            ops[k].append((position, node))
    result = Split(
        annotated,
        tuple(
            _stage(by_name, ops[k], k, held[k], shared[k], receives[k], returns[k])
            for k in range(K)
        ),
        routes,
        estimates,
        {node.name: stages for node, stages in assignment.items() if len(stages) > 1},
    )
    result.verify()
    return result


def _users(graph: fx.Graph, assignment: Assignment) -> dict[fx.Node, set[int]]:
    """For each tensor, in graph order, the stages that use it (its own if it is an output)."""
    users: dict[fx.Node, set[int]] = {n: set() for n in graph.nodes if n.op != "output"}
    sized: dict[tuple[str, int], Any] = {}  # (symbol, stage that needs its value) → symbol
    for node, stages in assignment.items():
        for source in node.all_input_nodes:
            users[source].update(stages)
            if is_size(source):
                symbols = size_symbols(source.meta["val"])
                sized |= {(str(s), k): s for s in symbols for k in stages}
    for node in results_of(graph):
        users[node].add(assignment[node][0])
    users = {n: s for n, s in users.items() if not is_size(n)}
    tensors = [n for n in users if isinstance(n.meta["val"], Tensor)] if sized else []
    told = {n: readable_symbols(n.meta["val"]) for n in tensors}
    for (_, k), symbol in sorted(sized.items()):  # it needs a tensor whose shape tells the size
        telling = [n for n in tensors if symbol in told[n]]
        if not any(k in users[n] and k not in assignment.get(n, ()) for n in telling):
            users[telling[0]].add(k)
    return {n: s for n, s in users.items() if s}


def _stage(
    by_name: Mapping[str, fx.Node],
    ops: Sequence[tuple[int, fx.Node]],
    k: int,
    held: Sequence[Input],
    shared: Sequence[str],
    receives: Sequence[str],
    returns: Sequence[str],
) -> StageGraph:
    """Copy stage k's ops, with their positions in the whole graph, into a graph of their own."""
    stage = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for name in [*(i.name for i in held), *shared, *receives]:
        env[by_name[name]] = stage.placeholder(name)
        env[by_name[name]].meta = dict(by_name[name].meta)
    symbols: dict[Any, fx.Node] = {}

    def symbol_node(symbol: Any) -> fx.Node:
        if symbol not in symbols:
            values = [(env[n], n.meta["val"]) for n in env if isinstance(n.meta["val"], Tensor)]
            symbols[symbol] = emit_symbol(stage, symbol, values)
        return symbols[symbol]

    def argument(node: fx.Node) -> Any:
        if is_size(node) and node not in env:
            env[node] = emit_size(node.meta["val"], symbol_node)
        return env[node]

    for _, node in ops:
        env[node] = stage.node_copy(node, argument)
    stage.output(tuple(env[by_name[name]] for name in returns))
    position = {env[n]: i for i, n in ops}
    return StageGraph(
        index=k,
        graph_module=graph_module(stage, f"Stage{k}"),
        held=tuple(held),
        shared=tuple(shared),
        receives=tuple(receives),
        returns=tuple(returns),
        origins=tuple(position.get(n, -1) for n in stage.nodes),
        fingerprint=fingerprint(stage),
    )
