"""`Phased`: the joint graph of each stage, and the phase that runs each of its nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx

from autopipe.errors import printable, require

from .split import CALLER, Split
from .values import all_hold, results_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import sympy

    from autopipe.passes.remat_policies import RematPolicy

    from .values import Sizes

PHASES = ("F", "R", "B", "W")
"""Forward, recompute, gradients of received values, gradients of parameters: in this order."""


class RandomDraw(NamedTuple):
    """The key of a random draw, apart from the step's seed and the index of the micro-batch.

    Attributes:
        call: of the random op: its position in the stage graph, or `Captured.call_index`.
        nth: which of that op's draws it is.
        shared: whether all micro-batches draw the same numbers, because the op does not depend on
            the batch.
    """

    call: int
    nth: int
    shared: bool


@dataclass(frozen=True, eq=False)
class StagePhases:
    """One stage at one micro-batch size: a pure joint graph, and the phase of each node.

    The graph's placeholders are, in order: the runtime's `ctx`, `state`, `receives`, and one
    tangent per name in `tangents`. Its results are, in order: `returns`, one new value per name in
    `updates`, one gradient per name in `own_grads`, one per name in `sent_grads`.

    `codegen` writes a function per phase group (R, B and W are one where the schedule runs them
    together). Its arguments are `ctx` and a list of tensors, which it empties; it returns a list::

        F_{index}_b{size}(ctx, [*state, *receives]) -> [*returns, *updates, *saved]
        RBW_{index}_b{size}(ctx, [*state, *saved, *tangents]) -> [*sent_grads]

    Where the stage waits for its tangents, R runs before they arrive::

        R_{index}_b{size}(ctx, [*state, *saved]) -> [*kept]
        BW_{index}_b{size}(ctx, [*state, *kept, *tangents]) -> [*sent_grads]

    A backward passes the gradients in `own_grads` to ``ctx.accumulate(position, gradient)``. For
    ``mse_loss(c(relu(b(tanh(a(x))))), y)`` with linear layers a, b, c, a layer per stage,
    micro-batches of 4 and ``remat="full"`` (a stage saves what it received)::

        F_0_b4(ctx, [p_a_weight, p_a_bias, x]) -> [tanh, x]
        R_0_b4(ctx, [p_a_weight, p_a_bias, x]) -> [x, tanh_1]
        BW_0_b4(ctx, [p_a_weight, p_a_bias, x, tanh_1, grad_tanh]) -> []

        F_1_b4(ctx, [p_b_weight, p_b_bias, tanh]) -> [relu, tanh]
        R_1_b4(ctx, [p_b_weight, p_b_bias, tanh]) -> [tanh, relu_1, t_2]
        BW_1_b4(ctx, [p_b_weight, p_b_bias, tanh, relu_1, t_2, grad_relu]) -> [mm]

        F_2_b4(ctx, [p_c_weight, p_c_bias, y, relu]) -> [mse_loss, relu, y]
        RBW_2_b4(ctx, [p_c_weight, p_c_bias, relu, y, grad_mse_loss]) -> [mm]

    The first stage sends no gradient, since `x` requires none. Each `mm` is the gradient of the
    value that the stage received. The last stage's `mse_loss` goes to the caller, who sends
    `grad_mse_loss`. For inference there is only F, and nothing is saved.

    Attributes:
        index: of the stage.
        graph: joint forward and backward; pure except for random draws and caches of kernels.
        phase_of: node name → "F", "R", "B" or "W"; placeholders and the output have none.
        saved: values that F saves for the other phases (including received values).
        state: the stage's parameters, buffers and constants, then its copies of shared parameters.
        receives: values that arrive with every micro-batch.
        tangents: values whose gradients arrive with every micro-batch.
        returns: values that the stage sends to other stages or to the caller.
        updates: buffers that the forward changes.
        own_grads: parameters whose gradients the stage sums; unless sums are exact, also its copies
            of shared parameters.
        sent_grads: received values whose gradients it sends back; if sums are exact, also its
            copies.
        draws: the key of each random draw; `call` is the position in the captured graph.
        device: the device that it was traced for.
        conditions: on the symbols of symbolic sizes, under which it holds; () if there are none.
        kernels: the compute capability of the CUDA device that a plan is for and whose kernels are
            in the graph, which then cannot run; None: the kernels of `device`.
    """

    index: int
    graph: fx.Graph
    phase_of: Mapping[str, str]
    saved: tuple[str, ...]
    state: tuple[str, ...]
    receives: tuple[str, ...]
    tangents: tuple[str, ...]
    returns: tuple[str, ...]
    updates: tuple[str, ...]
    own_grads: tuple[str, ...]
    sent_grads: tuple[str, ...]
    draws: tuple[RandomDraw, ...]
    device: torch.device
    conditions: tuple[sympy.Basic, ...] = ()
    kernels: tuple[int, int] | None = None

    @property
    def labels(self) -> dict[str, str]:
        """Node name → name of the value, for the placeholders that are no tangents."""
        _, *placeholders = [n.name for n in self.graph.nodes if n.op == "placeholder"]
        return dict(zip(placeholders, (*self.state, *self.receives), strict=False))

    def results(self) -> dict[str, list[Any]]:
        """Return the joint graph's results by group: returns, updates, own_grads, sent_grads."""
        values = results_of(self.graph)
        groups: dict[str, list[Any]] = {}
        for group in ("returns", "updates", "own_grads", "sent_grads"):
            count = len(getattr(self, group))
            groups[group], values = values[:count], values[count:]
        return groups

    def verify(self) -> None:
        self.graph.lint()
        rank = {"F": 0, "R": 1, "B": 2, "W": 3}
        saved = set(self.saved)
        for node in self.graph.nodes:
            if node.op not in ("call_function", "call_method"):
                continue
            phase = self.phase_of.get(node.name)
            require(phase in rank, f"stage {self.index}: a node without a phase", node=node.name)
            for source in node.all_input_nodes:
                earlier = self.phase_of.get(source.name)
                if earlier is None or earlier == phase:
                    continue
                require(
                    rank[earlier] < rank[str(phase)],
                    f"stage {self.index}: phase {phase} needs a value of the later phase {earlier}",
                    node=node.name,
                    found=source.name,
                )
                require(
                    earlier != "F" or source.name in saved,
                    f"stage {self.index}: phase {phase} needs a value that F does not save",
                    node=node.name,
                    found=source.name,
                )


@dataclass(frozen=True, eq=False)
class Phased:
    """All stages cut into phases, for one micro-batch size, or for symbolic sizes.

    Attributes:
        split: the stages.
        size: samples in the micro-batch; if sizes are symbolic, in that which was traced.
        remat: for each stage, the rematerialization policy that chose `saved`.
        differentiable: names of the outputs that depend on a tensor which requires a gradient.
        differentiated: the outputs among them that will get a gradient; none for inference.
        stages: each stage with its phases; identical ones share their graph.
        symbols: the sizes that are symbolic: `B` or not, and names of lengths.
        conditions: on these, under which the phases hold.
    """

    split: Split
    size: int
    remat: tuple[RematPolicy, ...]
    differentiable: frozenset[str]
    differentiated: frozenset[str]
    stages: tuple[StagePhases, ...]
    symbols: tuple[sympy.Symbol, ...] = ()
    conditions: tuple[sympy.Basic, ...] = ()

    def holds_for(self, sizes: Sizes) -> bool:
        """Whether these are the phases for some sizes."""
        return all_hold(self.conditions, sizes)

    def verify(self) -> None:
        for stage in self.stages:
            stage.verify()
        for route in self.split.routes.values():
            for k in route.holders:
                to = route.gradient_to(k)
                if to is None or to == CALLER:
                    continue
                require(
                    (route.name in self.stages[k].sent_grads)
                    == (route.name in self.stages[to].tangents),
                    f"stages {k} and {to} disagree about a gradient",
                    node=route.name,
                )

    def __str__(self) -> str:
        lines = [
            f"phased: micro-batch of {self.size}, remat {', '.join(p.name for p in self.remat)}"
        ]
        for stage in self.stages:
            counts = {p: sum(q == p for q in stage.phase_of.values()) for p in PHASES}
            lines.append(f"stage {stage.index}: nodes {counts}, saved {list(stage.saved)}")
            lines += [
                f"  {self._letter(stage, n)} {n.format_node() or 'return ' + str(n.args[0])}"
                for n in stage.graph.nodes
            ]
        return printable("\n".join(lines), lines=True)

    @staticmethod
    def _letter(stage: StagePhases, node: fx.Node) -> str:
        return stage.phase_of.get(node.name, " ")
