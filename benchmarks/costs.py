"""The cost pass against torch's own counter, on the models themselves.

    python -m benchmarks.costs                     the models of the table
    python -m benchmarks.costs flops Swin Llama    architectures of the zoo ("all": every one)
    python -m benchmarks.costs split               two stages, cut by FLOPs and by seconds
    python -m benchmarks.costs cpu                 peak and bandwidth of one core

`flops`: each model is captured once with eight samples; its forward and backward FLOPs at 2, 3 and
5 samples are then compared with `FlopCounterMode` over eager torch, attention in its plain kernels
(the counter has no formula for the CPU's fused one). Bar: equal.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from autopipe.batch_dims import batch_of
from autopipe.call_signature import flatten
from autopipe.passes.capture.model import capture
from autopipe.passes.capture.request import CaptureRequest
from autopipe.passes.cost.node_costs import CallSeconds, annotate, call_seconds
from autopipe.passes.cost.stage_cost import sum_costs
from autopipe.passes.devices import DEFAULT
from autopipe.passes.graph.fx_utils import is_size
from autopipe.passes.ir.captured import Annotated
from autopipe.passes.ir.values import at_batch
from autopipe.passes.remat_policies import NONE
from autopipe.passes.split.cut import split
from autopipe.passes.split.objective import objective_of
from autopipe.planning.profile_calls import profile
from benchmarks.models import gpt2
from benchmarks.transformer_l import TransformerL
from tests.support.zoo import ZOO

SIZES = (2, 3, 5)
CAPTURED = 8
TABLE = ("GPT-2", "UNet2D", "T5", "Swin", "ResNet")
Loss = Callable[[Any], Tensor]
Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any], Loss, Any]


def case(name: str) -> Case:
    """An architecture of the zoo, or "Transformer-L" in small, with its in_dims."""
    if name == "Transformer-L":
        ids = torch.randint(0, 64, (CAPTURED, 16))
        small = TransformerL(3, width=32, inner=64, heads=4, vocabulary=64)
        return small, (ids, ids), {}, lambda loss: loss, 0
    entry = ZOO[name]
    model, kwargs = entry.build(False)
    return model, (), kwargs, entry.loss, entry.in_dims


def annotated(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], in_dims: Any = 0
) -> Annotated:
    """The model's costs; micro-batches are not combined, so that any model will do."""
    leaves, spec = flatten(args, kwargs)
    dims, _ = batch_of(in_dims, model, args, kwargs)
    return annotate(capture(CaptureRequest(model, leaves, spec, dims, whole=True)))


def narrowed(value: Any, samples: int) -> Any:
    """The first samples of whatever has as many as were captured."""

    def cut(x: Any) -> Any:
        batched = isinstance(x, Tensor) and x.dim() and x.shape[0] == CAPTURED
        return x[:samples] if batched else x

    return pytree.tree_map(cut, value)


def counted(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss
) -> tuple[int, int]:
    """FLOPs of forward and backward of the model itself, as torch counts them.

    What the loss does outside the model is left out: the backward starts at the model's results.
    """
    model = copy.deepcopy(model)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            result = model(*args, **kwargs)
        own: dict[int, tuple[Tensor, Tensor]] = {}

        def leaf(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.requires_grad:
                return x
            return own.setdefault(id(x), (x, x.detach().requires_grad_()))[1]

        loss(pytree.tree_map(leaf, result)).backward()
        pairs = [(x, y.grad) for x, y in own.values() if y.grad is not None]
        with FlopCounterMode(display=False) as backward:
            torch.autograd.backward(*zip(*pairs, strict=True))
    return forward.get_total_flops(), backward.get_total_flops()


def flops(names: list[str]) -> bool:
    """Compare; returns whether all are equal."""
    equal = 0
    for name in names:
        model, args, kwargs, loss, in_dims = case(name)
        found = annotated(model, args, kwargs, in_dims)
        costs = found.costs.values()
        forward, backward = sum_costs(costs, "forward_flops"), sum_costs(costs, "backward_flops")
        ours = [(at_batch(forward, b), at_batch(backward, b)) for b in SIZES]
        theirs = [counted(model, *narrowed((args, kwargs), b), loss) for b in SIZES]
        equal += ours == theirs
        estimated = sum(not c.exact for c in costs)
        said = "equal" if ours == theirs else f"differ: {ours} here, {theirs} torch's"
        print(
            f"{name:24} {len(costs):5} calls, backward/forward {ours[0][1] / ours[0][0]:.3f}"
            f" {said}" + (f", {estimated} estimated" if estimated else ""),
            flush=True,
        )
    print(f"{equal} of {len(names)} equal torch's counter, forward and backward, at B = {SIZES}")
    return equal == len(names)


def middling() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Models large enough that products count: model, batch of eight."""
    from diffusers import UNet2DModel
    from transformers import T5Config, T5ForConditionalGeneration

    model, inputs = gpt2(12, 256, 4, 128)
    found: dict[str, tuple[nn.Module, dict[str, Any]]] = {"GPT-2": (model, inputs(CAPTURED))}
    config = T5Config(
        num_layers=4,
        d_model=256,
        d_ff=1024,
        num_heads=4,
        d_kv=64,
        vocab_size=256,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    ids = torch.randint(1, 256, (CAPTURED, 128))
    found["T5"] = T5ForConditionalGeneration(config).train(), {"input_ids": ids, "labels": ids}
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    image = {"sample": torch.randn(CAPTURED, 3, 32, 32), "timestep": torch.arange(CAPTURED)}
    found["UNet2D"] = unet.train(), image
    return found


def balance(weights: list[float], second: list[bool]) -> float:
    """Mean stage over largest stage of two stages; `second`: which calls are in the second."""
    late = sum(weight for weight, is_late in zip(weights, second, strict=True) if is_late)
    return sum(weights) / 2 / max(late, sum(weights) - late)


def splits(batch: int = 4) -> None:
    """Two stages, cut by three rules; how even they are in FLOPs, and in measured time.

    "before" is the rule that came before backwards were costed: three forwards at 50 GFLOP/s and
    10 GB/s.
    """
    torch.set_num_threads(1)
    for name, (model, kwargs) in middling().items():
        found = annotated(model, (), kwargs)
        calls = [
            n
            for n in found.captured.graph_module.graph.nodes
            if n.op == "call_function" and not is_size(n)
        ]
        costs = [found.costs[n.name] for n in calls]
        work = [float(at_batch(c.forward_flops + c.backward_flops, batch)) for c in costs]
        forward = [float(at_batch(c.forward_flops, batch)) for c in costs]
        moved = [float(at_batch(c.forward_bytes, batch)) for c in costs]
        times = [call_seconds(c, DEFAULT, batch) for c in costs]
        with tempfile.TemporaryDirectory() as folder:
            measured = profile(found, batch, folder=folder)
        real = [measured.seconds(n.name) for n in calls]
        rules = {
            "FLOPs": work,
            "before": [3 * (f / 50e9 + m / 10e9) for f, m in zip(forward, moved, strict=True)],
            "seconds": [t.forward + t.backward for t in times],
        }
        for rule, weights in rules.items():
            known = {n.name: CallSeconds(w, 0.0, 0.0) for n, w in zip(calls, weights, strict=True)}
            objective = objective_of([DEFAULT] * 2, batch, remat=NONE)
            late = {n.name for n in split(found, replace(objective, times=known)).calls[1]}
            second = [n.name in late for n in calls]
            print(
                f"{name:8} cut by {rule:8} balance in FLOPs {balance(work, second):.3f},"
                f" in measured time {balance(real, second):.3f}"
            )


def cpu() -> None:
    """GFLOP/s of a product and GB/s of a copy, on one core: medians of seven."""
    torch.set_num_threads(1)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    x, y = torch.randn(2**25), torch.empty(2**25)
    for what, run, amount in (
        ("GFLOP/s", lambda: torch.mm(a, b), 2 * 1024**3),
        ("GB/s", lambda: y.copy_(x), 2 * x.nbytes),
    ):
        times = []
        for _ in range(8):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        print(f"{amount / statistics.median(times[1:]) / 1e9:.1f} {what}")


def main() -> None:
    what, *names = sys.argv[1:] or ["flops"]
    if what == "split":
        splits()
    elif what == "cpu":
        cpu()
    else:
        names = list(ZOO) if names == ["all"] else names or [*TABLE, "Transformer-L"]
        sys.exit(not flops(names))


if __name__ == "__main__":
    main()
