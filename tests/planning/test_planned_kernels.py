"""Plans for a CUDA device have its kernels and what they save, wherever they are made.

The truth is counted by hand: from what each layer's autograd formula saves (derivatives.yaml) and
from the documented results of CUDA's kernels. T is the number of tokens of a micro-batch.

Covers planning/plan_notes.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import autopipe
from autopipe.errors import VerifyError
from autopipe.options import parse_options
from autopipe.passes.devices import A100, CPU_CORE, H100, Device
from autopipe.passes.driver import lower_to_code
from autopipe.passes.ir.phased import Phased, StagePhases
from autopipe.passes.schedule import schedule_for
from autopipe.planning import search
from tests.support.zoo import ZOO

BF16, FP32 = torch.bfloat16, torch.float32
ELSEWHERE = replace(H100, compute_capability=None)
"""An H100 of which the kernels are not known: those of the CPU count."""

NOTED = re.compile("norm|drop|attention|bernoulli|safe_softmax")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Phased]:
    """The phases of the plans that a test makes."""
    found: list[Phased] = []
    trace = search.phases_by_size

    def noting(*args: Any, **kwargs: Any) -> dict[int, Phased]:
        phased = trace(*args, **kwargs)
        found.extend(phased.values())
        return phased

    monkeypatch.setattr(search, "phases_by_size", noting)
    return found


def kernels(stage: StagePhases) -> Counter[str]:
    """How often a stage calls norms, dropouts and attention, backward included."""
    found: Counter[str] = Counter()
    for node in stage.graph.nodes:
        target = node.args[2] if node.target == "draw" else node.target
        name = str(target).removeprefix("aten.").removesuffix(".default")
        if NOTED.search(name) and node.op != "placeholder":
            found[name] += 1
    return found


B, S, WIDTH, HEADS, WORDS, LAYERS = 2, 45, 64, 2, 100, 2
T, D = B * S, WIDTH


def attention_bytes(kernel: str, e: int) -> int:
    """Log-sum-exp, seed and offset, and the mask of each sample as numbers, made for each layer."""
    rows = ceil(S / 32) * 32 if kernel == "efficient" else S
    columns = ceil(S / 8) * 8 if kernel == "efficient" else S
    return 4 * B * HEADS * rows + 16 + B * S * columns * e


def gpt2_bytes(kernel: str, e: int, dropout: float) -> int:
    """What GPT-2 saves for elements of `e` bytes.

    A layer: its input, the norm's result, q, k and v, the attention's result, the second norm's
    input and result (8 D), and the MLP's five values of 4 D (gelu_new is written out in Python).
    A norm saves a mean and a deviation in fp32. The loss saves fp32 log-probabilities, labels, and
    its weight. Three kinds of ids: tokens, labels, positions.
    """
    masks = (2 * LAYERS + 1) * T * D if dropout else 0
    norms = (2 * LAYERS + 1) * 2 * T * 4
    layers = LAYERS * (28 * T * D * e + attention_bytes(kernel, e))
    head = 2 * T * D * e + T * WORDS * 4 + 4
    return layers + norms + masks + head + 2 * T * 8 + S * 8


def autocast_bytes(kernel: str, dropout: float) -> int:
    """The same with fp32 weights under CUDA's autocast to bf16.

    Products read bf16 copies, of weights too; norms and `pow` compute in fp32. A layer: two norms'
    inputs in fp32, their results, q, k, v and the attention's result in bf16 (20 bytes a value),
    and of gelu_new three values in fp32 and two in bf16 (64).
    """
    masks = (2 * LAYERS + 1) * T * D if dropout else 0
    norms = (2 * LAYERS + 1) * 2 * T * 4
    weights = (LAYERS * 12 * D * D + WORDS * D) * 2
    layers = LAYERS * (84 * T * D + attention_bytes(kernel, 2))
    head = (4 + 2) * T * D + T * WORDS * 4 + 4
    return layers + norms + masks + weights + head + 2 * T * 8 + S * 8


def gpt2(dropout: float, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    shape = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_positions": 48}
    drop = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), dropout)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**shape, **drop, vocab_size=WORDS, use_cache=False)).to(
            dtype
        )
        ids = torch.zeros(2 * B, S, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids}


def plan(model: nn.Module, device: Any, remat: Any = "none", **call: Any) -> autopipe.Plan:
    return autopipe.plan(model, 1, 2, device=device, remat=remat, **call)


@pytest.mark.parametrize(
    ("device", "dtype", "dropout", "kernel"),
    [
        (H100, FP32, 0.0, "efficient"),
        (H100, FP32, 0.1, "efficient"),
        (H100, BF16, 0.0, "cudnn"),
        (H100, BF16, 0.1, "efficient"),
        (A100, BF16, 0.1, "efficient"),
    ],
)
def test_gpt2(
    device: Device, dtype: torch.dtype, dropout: float, kernel: str, traced: list[Phased]
) -> None:
    model, call = gpt2(dropout, dtype)
    found = plan(model, device, kwargs=call)
    (stage,) = traced[0].stages
    drops = {"native_dropout": 5, "native_dropout_backward": 5} if dropout else {}
    attention = f"_scaled_dot_product_{kernel}_attention"
    assert kernels(stage) == {
        "native_layer_norm": 5,
        "native_layer_norm_backward": 5,
        attention: 2,
        f"{attention}_backward": 2,
        **drops,
    }
    assert found.stages[0].saved_bytes == gpt2_bytes(kernel, dtype.itemsize, dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gpt2_under_autocast(dropout: float) -> None:
    model, call = gpt2(dropout, FP32)
    with torch.autocast("cpu", torch.bfloat16):
        found = plan(model, H100, kwargs=call)
    kernel = "efficient" if dropout else "cudnn"
    assert found.stages[0].saved_bytes == autocast_bytes(kernel, dropout)


class Regions(nn.Module):
    """A product inside of a region without autocast, and one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(D, D, False), nn.Linear(D, D, False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.inside(x)
        return self.outside(y).softmax(-1)


def test_regions_of_the_model_s_own() -> None:
    """Saved: x and the softmax's result in fp32, the second product's input in bf16, and the bf16
    copy of its weight."""
    with torch.autocast("cpu", torch.bfloat16):
        found = plan(Regions(), H100, args=(torch.zeros(2 * B, S, D),))
    assert found.stages[0].saved_bytes == T * D * (4 + 4 + 2) + D * D * 2


@pytest.mark.parametrize("remat", ["full", "min-cut", 0.5])
def test_with_rematerialization(remat: Any) -> None:
    """Recomputed kernels are CUDA's, too: less is saved, and the forward takes as long."""
    model, call = gpt2(0.1, BF16)
    none, some = (plan(model, H100, r, kwargs=call) for r in ("none", remat))
    assert some.stages[0].saved_bytes < none.stages[0].saved_bytes
    assert some.stages[0].forward_seconds == pytest.approx(none.stages[0].forward_seconds)
    assert some.stages[0].recompute_seconds > 0


class Grouped(nn.Module):
    """Causal attention without a mask, in which two queries share a key and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(D, n, False) for n in (D, D // 2, D // 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, 16).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("device", "kernel", "philox"), [(H100, "cudnn", 16), (A100, "flash", 24)])
def test_grouped_queries_save_one_key_for_two(
    device: Device, kernel: str, philox: int, traced: list[Phased]
) -> None:
    x = torch.zeros(2 * B, S, D, dtype=BF16)
    found = plan(Grouped().to(BF16), device, args=(x,))
    attention = f"_scaled_dot_product_{kernel}_attention"
    assert kernels(traced[0].stages[0]) == {attention: 1, f"{attention}_backward": 1}
    # the projections, and two products of attention for each of four heads, causal ones whole
    assert found.stages[0].flops == 2 * T * D * 2 * D + 2 * 2 * B * 4 * S * S * 16
    # x, q, k, v, the result; the log-sum-exp of four heads
    assert found.stages[0].saved_bytes == T * D * 2 * 4 + 4 * B * 4 * S + philox


@pytest.mark.parametrize(("how", "own"), [("micro", 0), ("deferred", 2)])
def test_convolutions_with_batch_norm(how: Any, own: int, traced: list[Phased]) -> None:
    """Saved: the input, the convolution's result, a mean and a deviation, relu's result.

    The norm's formula also saves the running statistics that it is given: "deferred" gives it some
    of each micro-batch's own; the model's buffers do not count.
    """
    first = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    layers = nn.Sequential(*first, nn.Flatten(), nn.Linear(144, 2))
    found = plan(layers, H100, args=(torch.zeros(8, 3, 8, 8),), batch_norm=how)
    values = 4 * (3 * 64 + 4 * 36 + 4 * 36)
    assert found.stages[0].saved_bytes == 4 * (values + (2 + own) * 4)
    names = {"cudnn_batch_norm": 1, "cudnn_batch_norm_backward": 1}
    assert kernels(traced.pop().stages[0]) == names


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "Llama",
            {"_scaled_dot_product_efficient_attention": 2},
        ),
        pytest.param(
            "UNet2D",
            {
                "native_dropout": 8,
                "native_group_norm": 21,
                "_scaled_dot_product_efficient_attention": 4,
            },
            marks=pytest.mark.full,
        ),
        pytest.param("ResNet", {"cudnn_batch_norm": 12}, marks=pytest.mark.full),
    ],
)
def test_models_of_the_zoo(name: str, wanted: dict[str, int], traced: list[Phased]) -> None:
    """In fp32, with dropout; each kernel has its backward. The CPU saves more."""
    model, call = ZOO[name].build(dropout=True)
    found = autopipe.plan(model, 1, 1, device="h100", remat="none", kwargs=call)
    (stage,) = traced[0].stages
    assert kernels(stage) == wanted | {f"{n}_backward": c for n, c in wanted.items()}
    others = autopipe.plan(model, 1, 1, device=ELSEWHERE, remat="none", kwargs=call)
    assert found.stages[0].saved_bytes < others.stages[0].saved_bytes


def test_each_stage_has_the_kernels_of_its_device(traced: list[Phased]) -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Dropout(), nn.Linear(8, 8)) for _ in range(3)))
    devices = ["cpu-core", "h100", "a100-80gb"]
    autopipe.plan(layers, 3, 2, device=devices, args=(torch.ones(4, 8),), cut_at=["1", "2"])
    stages = traced[0].stages
    assert [s.kernels for s in stages] == [None, (9, 0), (8, 0)]
    assert ["native_dropout" in kernels(s) for s in stages] == [False, True, True]


def test_whose_kernels() -> None:
    def found(devices: Any, **more: Any) -> tuple[Any, ...]:
        options: dict[str, Any] = {"chunks": 2, "schedule": "gpipe", "remat": "none"}
        options |= {"memory": None, "in_dims": 0, "out_reduce": None, "batch_norm": "deferred"}
        return parse_options(devices=devices, **options, **more).stage_kernels

    assert found(["cpu"] * 2) == (None, None)
    assert found(["cpu"] * 2, device="h100") == ((9, 0), (9, 0))
    assert found(["cpu"] * 2, device=["h100", "cpu-core"]) == ((9, 0), None)
    assert found(["cpu"] * 2, device="h100", profile=True) == (None, None)
    assert found(["cpu"] * 2, device=replace(CPU_CORE, name="mine")) == (None, None)


def test_a_planned_stage_never_runs(traced: list[Phased]) -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 1))
    x = torch.ones(4, 8)
    plan(layers, H100, args=(x,))
    order = schedule_for("gpipe", 1)
    with pytest.raises(VerifyError, match="another device's kernels"):
        lower_to_code(
            {2: traced[0]},
            [2, 2],
            [torch.device("cpu")],
            order=order,
            early_backward=False,
            least_queue=lambda source, to: 1,
        )


def test_a_pipeline_made_by_a_plan_has_its_own_kernels() -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.RMSNorm(8), nn.Linear(8, 1))
    x = torch.ones(4, 8)
    made = autopipe.plan(layers, 2, 2, device="h100", args=(x,))
    pipe = autopipe.compile(layers, ["cpu"] * 2, plan=made, args=(x,))
    pipe(x).sum().backward()
    assert "native_dropout" not in pipe.code
    assert "fused_rms_norm" not in pipe.code


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0].mean((1, 2))


def test_a_plan_says_whose_kernels_it_cannot_count() -> None:
    x = torch.ones(4, 3, 8)
    planned, here = (plan(Recurrent(), device, args=(x,)) for device in (H100, None))
    assert any(note.startswith("lstm: times and memory are") for note in planned.notes)
    assert here.notes == planned.notes[:-1]


def test_the_cut_is_costed_by_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate for attention with dropout is that of the fused kernel."""
    saved: list[float] = []
    annotate: Callable[..., Any] = autopipe.passes.driver.annotate

    def noting(*args: Any) -> Any:
        found = annotate(*args)
        saved.append(sum(float(c.saved_bytes.subs("B", B)) for c in found.costs.values()))
        return found

    monkeypatch.setattr(autopipe.passes.driver, "annotate", noting)
    model, call = gpt2(0.1, BF16)
    for device in (H100, ELSEWHERE):
        plan(model, device, kwargs=call)
    assert saved[0] < saved[1]
    exact = gpt2_bytes("efficient", 2, 0.1)
    assert saved[0] == pytest.approx(exact, rel=0.15)


def test_the_figures_of_the_guide() -> None:
    """GPT-2 with its defaults, two layers of width 1600, one sample of 1,024 tokens."""
    text = (Path(__file__).parents[2] / "docs/guide.md").read_text(encoding="utf-8")
    written = re.findall(r"^\| (?:the CPU's|an H100's) \| ([\d,]+) MiB \|$", text, re.M)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=1600, n_head=25)).bfloat16()
        ids = torch.zeros(2, 1024, dtype=torch.long)
    call = {"input_ids": ids, "labels": ids}
    plans = [plan(model, device, kwargs=call) for device in (ELSEWHERE, H100)]
    assert [f"{p.stages[0].saved_bytes / 2**20:,.0f}" for p in plans] == written
