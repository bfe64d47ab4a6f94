"""Part of `benchmarks.gpu`: the kernels that a plan counts, beside those that run.

A plan for a GPU that is made where no GPU is takes its kernels from a table (`passes/kernels`).
Here the table meets the device: for each model, the norms, dropouts, attention and softmaxes of the
plan's trace, of a trace on this device, and of plain autograd; and the bytes that the plan says a
micro-batch saves, beside those that a pipeline saves. On a CPU the trace with the CPU's own kernels
is compared instead, so that mistakes of this part show, and the plan's kernels for an H100 are
printed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import autopipe
from autopipe.passes.devices import H100, Device
from autopipe.passes.ir import Phased
from autopipe.planning import search
from benchmarks.gpu_setting import Setting
from benchmarks.models import gpt2
from tests.support.reference import over_chunks

COMPARED = re.compile("norm|drop|attention|softmax|bernoulli")
BF16 = torch.bfloat16


class Case(NamedTuple):
    """A model, a call, and the autocast around it (None: none)."""

    model: nn.Module
    call: dict[str, Tensor]
    autocast: torch.dtype | None = None


class Attention(nn.Module):
    """Causal attention without a mask; `groups` queries share a key."""

    def __init__(self, width: int, heads: int, groups: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.groups, self.dropout = heads, groups, dropout
        self.norm = nn.RMSNorm(width)
        sizes = (width, width // groups, width // groups)
        self.products = nn.ModuleList(nn.Linear(width, n, bias=False) for n in sizes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (p(y).view(*x.shape[:2], -1, x.shape[2] // self.heads) for p in self.products)
        rows = (t.transpose(1, 2) for t in (q, k, v))
        found = F.scaled_dot_product_attention(
            *rows, dropout_p=self.dropout, is_causal=True, enable_gqa=self.groups > 1
        )
        return found.transpose(1, 2).flatten(2).square().mean()


def attention(setting: Setting, dtype: torch.dtype, **options: Any) -> Case:
    heads, head, length = (4, 16, 40) if setting.tiny else (16, 64, 1000)
    model = Attention(heads * head, heads, **options).to(dtype)
    return Case(model, {"x": torch.randn(4, length, heads * head, dtype=dtype)})


def language(
    setting: Setting, dtype: torch.dtype, dropout: float, autocast: torch.dtype | None = None
) -> Case:
    shape = (2, 32, 2, 24, 128) if setting.tiny else (4, 1024, 16, 512, 50257)
    model, inputs = gpt2(*shape)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    return Case(model.to(dtype), inputs(4), autocast)


def images(setting: Setting, dtype: torch.dtype, last: bool = False) -> Case:
    size, width = (16, 8) if setting.tiny else (64, 64)
    layers: list[nn.Module] = []
    for n in (3, width):
        layers += [nn.Conv2d(n, width, 3), nn.BatchNorm2d(width), nn.SiLU(), nn.Dropout(0.1)]
    model = nn.Sequential(*layers, nn.GroupNorm(2, width), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(8, 3, size, size, dtype=dtype).to(memory_format=order)
    return Case(model.to(dtype, memory_format=order), {"input": x})


CASES: dict[str, Callable[[Setting], Case]] = {
    "attention, bf16": lambda s: attention(s, BF16),
    "attention, bf16, dropout 0.1": lambda s: attention(s, BF16, dropout=0.1),
    "attention, bf16, dropout 0.125": lambda s: attention(s, BF16, dropout=0.125),
    "attention, fp32": lambda s: attention(s, torch.float32),
    "attention, fp32, dropout 0.1": lambda s: attention(s, torch.float32, dropout=0.1),
    "grouped attention, bf16": lambda s: attention(s, BF16, groups=2),
    "grouped attention, fp32": lambda s: attention(s, torch.float32, groups=2),
    "GPT-2, fp32": lambda s: language(s, torch.float32, 0.0),
    "GPT-2, fp32, dropout 0.1": lambda s: language(s, torch.float32, 0.1),
    "GPT-2, bf16": lambda s: language(s, BF16, 0.0),
    "GPT-2, bf16, dropout 0.1": lambda s: language(s, BF16, 0.1),
    "GPT-2, autocast, dropout 0.1": lambda s: language(s, torch.float32, 0.1, BF16),
    "images, fp32": lambda s: images(s, torch.float32),
    "images, fp32, channels last": lambda s: images(s, torch.float32, last=True),
    "images, bf16": lambda s: images(s, BF16),
}


class Kernels(NamedTuple):
    """What a training step calls, of the compared kinds, and the bytes that it saves."""

    calls: Counter[str]
    saved: int

    def __str__(self) -> str:
        calls = ", ".join(f"{name} {n}" for name, n in sorted(self.calls.items()))
        return f"{self.saved:,} bytes; {calls}"


def named(operators: Iterable[Any]) -> Counter[str]:
    """How often each operator of the compared kinds is called, by the names of plans."""
    names = (str(op).removeprefix("aten.").removeprefix("autopipe.") for op in operators)
    plain = (name.partition(".")[0].strip("_").removesuffix("_legit_functional") for name in names)
    return Counter(name for name in plain if COMPARED.search(name))


def counted(case: Case, devices: Any, device: Device | None) -> Kernels:
    """What a plan counts: one stage, one micro-batch."""
    found: list[Phased] = []
    trace = search.phases_by_size

    def noting(*args: Any, **kwargs: Any) -> dict[int, Phased]:
        phased = trace(*args, **kwargs)
        found.extend(phased.values())
        return phased

    with mock.patch.object(search, "phases_by_size", noting):
        plan = autopipe.plan(
            *(case.model, devices, 1), kwargs=case.call, device=device, remat="none"
        )
    (stage,) = found[0].stages
    calls = (n.args[2] if n.target == "draw" else n.target for n in stage.graph.nodes)
    return Kernels(named(calls), plan.stages[0].saved_bytes)


class Calls(TorchDispatchMode):
    """The operators that are dispatched while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **kwargs or {})


def loss_of(result: Any) -> Tensor:
    found = getattr(result, "loss", result)
    return found if found.ndim == 0 else found.float().square().mean()


def that_runs(case: Case, device: torch.device) -> Kernels:
    """What the captured graph calls on a device under plain autograd, and what a pipeline saves.

    (Not the model: Hugging Face's attention passes a mask while it is captured, and none eagerly.)
    """
    pipe = autopipe.compile(case.model, [device], 1, kwargs=case.call, remat="none")
    loss_of(pipe(**case.call)).backward()
    with Calls() as calls:
        over_chunks(pipe.captured, case.model, list(case.call.values()), 1)
    return Kernels(named(calls.operators), pipe.memory.stages[0].peak)


def model_of(setting: Setting) -> Device | None:
    """The device model of the GPU, by its compute capability; None for a CPU."""
    if setting.device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(setting.device)
    return replace(H100, name="here", compute_capability=capability)


def kernels(setting: Setting) -> None:
    """Compare each case; on a CPU with the CPU's own trace."""
    device, planned = setting.device, model_of(setting)
    setting.card.synchronize()
    differ = []
    for name, make in CASES.items():
        with setting.guarded(f"kernels: {name}"):
            case = make(setting)
            autocast = case.autocast
            with torch.autocast("cpu", autocast) if autocast else nullcontext():
                table = counted(case, ["cpu"], planned)
                if planned is None:
                    print(f"{name}: an H100 by the table: {counted(case, ['cpu'], H100)}")
            case.model.to(device)
            here = case._replace(call={n: x.to(device) for n, x in case.call.items()})
            with torch.autocast(device.type, autocast) if autocast else nullcontext():
                traced = counted(here, [device], None)
                runs = that_runs(here, device)
            same = table == traced and table.calls == runs.calls
            if not same or table.saved != runs.saved:
                differ.append(name)
            print(f"{name}: by the table  {table}")
            print(f"{name}: traced here   {traced}")
            print(f"{name}: run here      {runs}", flush=True)
    print(f"differ: {', '.join(differ) or 'none'}")
