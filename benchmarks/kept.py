"""What stages are estimated to save and recompute, against what they do when they are traced.

    python -m benchmarks.kept

For each model, cut into two stages, and each policy: of the bytes that a further micro-batch in
flight saves, and of the seconds of recomputation, estimated over traced, stage by stage. The
estimate steers the search for a cut (`passes/split`); plans go by the trace.
"""

from __future__ import annotations

from typing import Any

import torch

from autopipe.batch_dims import batch_of
from autopipe.call_signature import flatten
from autopipe.options import parse_options
from autopipe.passes.capture.request import CaptureRequest
from autopipe.passes.cost.phase_memory import stage_bytes
from autopipe.passes.cost.phase_time import phase_seconds
from autopipe.passes.devices import CPU_CORE
from autopipe.passes.driver import capture_with_costs, cut_into_stages, phases_by_size
from autopipe.passes.ir.values import at_batch
from autopipe.passes.phases.request import TraceCache
from autopipe.passes.remat_policies import FULL, MIN_CUT, NONE, fraction_policy
from autopipe.passes.split.objective import Objective
from autopipe.passes.split.op_costs import OpCosts
from autopipe.tensor_meta import training_request
from benchmarks.models import gpt2, swin, t5, unet

POLICIES = (NONE, MIN_CUT, *map(fraction_policy, (0.75, 0.5, 0.25)), FULL)
SIZE = 4


def show(name: str, model: torch.nn.Module, args: Any, kwargs: Any) -> None:
    """Print a line for each policy."""
    leaves, spec = flatten(args, kwargs)
    dims, _ = batch_of(0, model, args, kwargs)
    annotated = capture_with_costs(CaptureRequest(model, leaves, spec, dims))
    options = parse_options(
        devices=["cpu"] * 2,
        chunks=1,
        schedule="gpipe",
        remat="full",
        memory=None,
        in_dims=0,
        out_reduce=None,
        batch_norm="deferred",
    )
    objective = Objective(SIZE, (CPU_CORE,) * 2, (NONE,) * 2, (1, 1), (None, None))
    split = cut_into_stages(annotated, objective)
    costs, traced = OpCosts(split.annotated, objective), TraceCache()
    for policy in POLICIES:
        request = training_request(model, split, leaves, [SIZE], options.devices, (policy,) * 2)
        phased = phases_by_size(request, traced)[SIZE]
        kept, again = [], []
        for stage, calls in zip(split.stages, split.ops, strict=True):
            read = costs.read_by_backward
            used = {s.name for node in calls for s in node.all_input_nodes if s in read}
            received = [n for n in stage.receives if policy.saves_received or n in used]
            estimate = sum(costs.saved_bytes_in_flight(policy)[node] for node in calls)
            estimate += sum(at_batch(split.routes[n].spec.nbytes, SIZE) for n in received)
            kept.append(_ratio(estimate, stage_bytes(phased.stages[stage.index]).saved))
            plain, more = (costs.seconds(CPU_CORE, p) for p in (NONE, policy))
            seconds = sum(more[node] - plain[node] for node in calls)
            again.append(
                _ratio(seconds, phase_seconds(phased.stages[stage.index], CPU_CORE).recompute)
            )
        print(
            f"{name:6} {policy.name:8} kept {', '.join(kept)}; again {', '.join(again)}", flush=True
        )


def _ratio(estimate: float, traced: float) -> str:
    if not traced:
        return "nothing" if not estimate else "too much"
    return f"{estimate / traced:.2f}"


def main() -> None:
    torch.set_num_threads(1)
    model, inputs = gpt2(4, 256, 4, 64)
    show("gpt2", model, (), inputs(SIZE))
    for name, make in (("t5", t5), ("unet", unet), ("swin", swin)):
        net, calls = make()
        show(name, net, *calls(SIZE))


if __name__ == "__main__":
    main()
