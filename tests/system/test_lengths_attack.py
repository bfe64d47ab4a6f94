"""Models that do something with their length: each is eager torch's at every length, in value and
gradient, and is captured twice, or as often as it has branches.
"""

from __future__ import annotations

import copy
import math
import pickle
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe import program_cache

Between = Callable[[Tensor], Any]
LENGTHS = (6, 9, 12, 6, 40, 7)
WIDTH = 8


class Around(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.between(self.first(x))))
        return result


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per capture."""
    found: list[int] = []
    capture = program_cache.capture_with_costs

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return capture(*args, **kwargs)

    monkeypatch.setattr(program_cache, "capture_with_costs", counted)
    return found


def sequences(length: int, samples: int = 4) -> Tensor:
    return torch.randn(samples, length, WIDTH)


def leaves(result: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]


def gradients(model: nn.Module, result: Any, inputs: Sequence[Any]) -> list[Tensor | None]:
    """Of a sum in which every number of a result has a weight of its own."""
    model.zero_grad()
    parts = [x for x in leaves(result) if x.requires_grad]
    if parts:
        weights = [torch.linspace(0.5, 1.5, x.numel()).view(x.shape) for x in parts]
        torch.autograd.backward(parts, [w.to(x.dtype) for w, x in zip(weights, parts, strict=True)])
    found = [p.grad for p in model.parameters()]
    return [*found, *(x.grad for x in inputs if isinstance(x, Tensor))]


def compare(pipe: autopipe.Pipeline, truth: nn.Module, *inputs: Any) -> Any:
    """Results, gradients and buffers of one call are eager torch's."""
    eager, piped = (
        [x.clone().requires_grad_(x.is_floating_point()) for x in inputs] for _ in range(2)
    )
    expected, found = truth(*eager), pipe(*piped)
    torch.testing.assert_close(found, expected)
    grads = gradients(pipe.model, found, piped), gradients(truth, expected, eager)
    assert [g is None for g in grads[0]] == [g is None for g in grads[1]]
    for mine, its in zip(*grads, strict=True):
        if mine is not None and its is not None:
            scale = float(its.abs().max()) if its.numel() else 0.0
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5 * max(scale, 1))
    for name, buffer in truth.named_buffers():
        torch.testing.assert_close(pipe.model.get_buffer(name), buffer)
    return found


def compiled(
    model: nn.Module, devices: int = 2, chunks: int | None = 2, **options: Any
) -> tuple[autopipe.Pipeline, nn.Module]:
    return autopipe.compile(model, devices=devices, chunks=chunks, **options), copy.deepcopy(model)


def compare_all(model: nn.Module, calls: Sequence[Sequence[Any]], **options: Any) -> None:
    pipe, truth = compiled(model, **options)
    for inputs in calls:
        compare(pipe, truth, *inputs)


# ---------------------------------------------------------------------------- what a length is for


def causal(x: Tensor) -> Tensor:
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return (x @ x.transpose(1, 2)).masked_fill(~seen, float("-inf")).softmax(-1) @ x


def in_blocks(x: Tensor) -> Tensor:
    padded = F.pad(x, (0, 0, 0, -x.shape[1] % 4))
    blocks = padded.view(x.shape[0], -1, 4, WIDTH)
    return (blocks - blocks.mean(2, keepdim=True)).reshape(padded.shape)[:, : x.shape[1]]


def attends(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*[x[:, None]] * 3, is_causal=True)[:, 0]


def channels(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Between:
    return lambda x: function(x.transpose(1, 2), *args, **kwargs).transpose(1, 2)


OLD = torch.__version__ < "2.13"
"""Torch 2.11 and 2.12 tell odd from even lengths when it pools."""

USES: dict[str, tuple[Between, int]] = {
    "root of the length": (lambda x: x / x.shape[1] ** 0.5, 2),
    "rounded": (lambda x: x[:, : round(x.shape[1] * 0.7)], 2),
    "floor": (lambda x: x[:, : math.floor(x.shape[1] / 2)], 2),
    "ceil": (lambda x: x[:, : math.ceil(x.shape[1] / 2)], 2),
    "trunc": (lambda x: x[:, : math.trunc(x.shape[1] / 2)], 2),
    "a condition as a factor": (lambda x: x * (x.shape[1] > 8), 2),
    "a condition as a tensor": (lambda x: torch.where(torch.tensor(x.shape[1] > 8), x, -x), 2),
    "filled with a root": (lambda x: x * torch.full((x.shape[1], 1), x.shape[1] ** 0.5), 2),
    "division": (lambda x: x / x.shape[1], 2),
    "one over it": (lambda x: x * (1 / x.shape[1]), 2),
    "absolute value": (lambda x: x / abs(5 - x.shape[1] / 2), 2),
    "remainder and square": (lambda x: x * (x.shape[1] % 3 + x.shape[1] ** 2), 2),
    "alpha": (lambda x: torch.add(x, x, alpha=x.shape[1]), 2),
    "a tensor of it": (lambda x: x / torch.tensor(x.shape[1]), 2),
    "positions": (lambda x: x + torch.arange(x.shape[1])[:, None] / x.shape[1], 2),
    "first half": (lambda x: x[:, : x.shape[1] // 2], 2),
    "last half": (lambda x: x[:, -(x.shape[1] // 2) :], 2),
    "at most eight": (lambda x: x[:, : min(x.shape[1], 8)], 3),
    "two chunks": (lambda x: torch.cat([-c for c in x.chunk(2, 1)], 1), 2),
    "windows": (lambda x: x.unfold(1, 3, 1).mean(-1), 2),
    "padded to a multiple": (lambda x: F.pad(x, (0, 0, 0, -x.shape[1] % 4)), 2),
    "blocks": (in_blocks, 3),  # without padding it is another graph
    "causal mask": (causal, 2),
    "attention": (attends, 2),
    "mean": (lambda x: x.mean(1, keepdim=True), 2),
    "flip": (lambda x: x.flip(1), 2),
    "cumulative sum": (lambda x: x.cumsum(1), 2),
    "largest half": (lambda x: x.topk(x.shape[1] // 2, 1)[0], 2),
    "sorted": (lambda x: x.sort(1)[0], 2),
    "every second": (lambda x: x[:, ::2], 2),
    "differences": (lambda x: x[:, 1:] - x[:, :-1], 2),
    "one row per token": (lambda x: x.reshape(-1, WIDTH).softmax(-1).view(x.shape), 2),
    "normalized over it": (channels(lambda y: F.layer_norm(y, y.shape[-1:])), 2),
    "stretched": (channels(F.interpolate, scale_factor=2), 2),
    "to five": (channels(F.interpolate, size=5, mode="linear"), 2),
    "product and bias": (
        lambda x: torch.baddbmm(
            x.new_ones(1, 1, WIDTH), x, x.new_ones(WIDTH, WIDTH).expand(x.shape[0], -1, -1)
        ),
        2,
    ),
    "largest of two": (channels(F.max_pool1d, 2), 2 + OLD),
    "largest of three": (channels(F.max_pool1d, 3, stride=1, padding=1), 2),
    "pooled to four": (channels(F.adaptive_avg_pool1d, 4), 2),
    "a branch": (lambda x: x * 2 if x.shape[1] > 8 else x * 3, 3),
    "even or odd": (lambda x: x * 2 if x.shape[1] % 2 == 0 else x * 3, 3),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("use", USES)
def test_a_length_that_is_used(use: str, captures: list[int]) -> None:
    torch.manual_seed(0)
    between, most = USES[use]
    compare_all(Around(between), [[sequences(n)] for n in LENGTHS])
    assert len(captures) <= most


FIXED: dict[str, Between] = {
    "a loop": lambda x: torch.stack([x[:, i] * i for i in range(x.shape[1])], 1),
    "as many pieces as there are": lambda x: torch.cat([-c for c in x.split(4, 1)], 1),
    "math.log": lambda x: x * math.log(x.shape[1]),
    "float()": lambda x: x * float(x.shape[1]),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("use", FIXED)
def test_a_length_that_becomes_a_number_is_captured_each_time(
    use: str, captures: list[int]
) -> None:
    torch.manual_seed(0)
    pipe, truth = compiled(Around(FIXED[use]))
    compare(pipe, truth, sequences(6))
    with pytest.warns(UserWarning, match="dimension 1 of x: .*turns it into a number"):
        compare(pipe, truth, sequences(9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (12, 9, 6):
            compare(pipe, truth, sequences(length))
    assert len(captures) == 3


# ------------------------------------------------------------------------------- sizes by accident


ACCIDENTS = {
    "the batch": (4, 6, 4, 2, 8, 3),
    "the width": (8, 6, 8, 4, 2),
    "one": (1, 5, 1, 7, 3, 1),
    "none": (6, 0, 9, 0, 2),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("same", ACCIDENTS)
@pytest.mark.parametrize("between", [causal, lambda x: x * 2], ids=["causal", "pointwise"])
def test_a_length_that_is_another_size(same: str, between: Between, captures: list[int]) -> None:
    torch.manual_seed(0)
    compare_all(Around(between), [[sequences(n)] for n in ACCIDENTS[same]])
    assert len(captures) <= 4


def test_batches_of_all_sizes_at_all_lengths(captures: list[int]) -> None:
    torch.manual_seed(0)
    both = ((8, 6), (8, 9), (7, 9), (3, 12), (1, 12), (1, 9), (2, 2), (5, 31), (4, 4), (1, 1))
    compare_all(Around(attends), [[sequences(n, b)] for b, n in both], chunks=4)
    assert len(captures) <= 4


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.relu(self.first(x)).mean((2, 3)))
        return result


def test_square_images_and_then_others(captures: list[int]) -> None:
    torch.manual_seed(0)
    sizes = ((8, 8), (12, 12), (16, 16), (8, 12), (12, 16), (9, 7))
    compare_all(Convolves(), [[torch.randn(4, 3, h, w)] for h, w in sizes])
    assert len(captures) <= 3


# ------------------------------------------------------------------------------------------ models


class Predicts(nn.Module):
    """A language model with a table of positions, whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.table = nn.Embedding(20, WIDTH), nn.Embedding(64, WIDTH)
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 20)
        self.head.weight = self.tokens.weight
        self.register_buffer("numbers", torch.arange(64)[None])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.table(self.numbers[:, : x.shape[1]])
        scores = self.head(torch.tanh(self.layer(hidden)))[:, :-1]
        return F.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def test_a_loss_that_leaves_out_padding(captures: list[int]) -> None:
    torch.manual_seed(0)
    calls = []
    for samples, length in ((4, 6), (4, 9), (4, 12), (3, 7)):
        labels = torch.randint(0, 20, (samples, length))
        labels[:, length // 2 :], labels[0] = -100, -100
        calls.append([torch.randint(0, 20, (samples, length)), labels])
    compare_all(Predicts(), calls)
    assert len(captures) == 2


class Translates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(WIDTH, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        result: Tensor = self.net(source, target, tgt_mask=mask, tgt_is_causal=True)
        return result


@pytest.mark.full
def test_two_lengths(captures: list[int]) -> None:
    torch.manual_seed(0)
    both = ((6, 5), (9, 5), (12, 7), (7, 7), (20, 9), (7, 20))
    compare_all(Translates(), [[sequences(n), sequences(m)] for n, m in both])
    assert len(captures) == 3


class Skips(nn.Module):
    """Values of early layers are used in late ones; some results are views, some are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Any:
        kept, hidden = [], x
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden)) + x
            kept.append(hidden)
        views = kept[2].transpose(1, 2), kept[3][:, 0]
        sizes = {"length": x.shape[1], "half": x.shape[1] / 2}
        return torch.cat([kept[0], kept[5]], 1), hidden.mean(1), views, sizes


@pytest.mark.few(2)
@pytest.mark.parametrize("remat", ["full", "none", "min-cut", 0.5])
@pytest.mark.parametrize("chunks", [4, 1])
def test_skips_views_and_sizes(remat: Any, chunks: int, captures: list[int]) -> None:
    torch.manual_seed(0)
    calls = [[sequences(n, b)] for n, b in ((8, 8), (12, 8), (16, 8), (3, 8), (5, 3))]
    compare_all(Skips(), calls, devices=3, chunks=chunks, remat=remat)
    assert len(captures) == 2


class Writes(nn.Module):
    """Batch norm over time, and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(4, 5, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.shape[2]
        result: Tensor = self.last(torch.relu(self.norm(self.first(x)))) + self.seen
        return result


def test_buffers_that_are_written(captures: list[int]) -> None:
    torch.manual_seed(0)
    compare_all(Writes(), [[torch.randn(4, 3, n)] for n in (8, 12, 16, 9)], chunks=1)
    assert len(captures) == 2


# ------------------------------------------------------------------------------- around a pipeline


def ready(**options: Any) -> tuple[autopipe.Pipeline, nn.Module]:
    """A pipeline that serves all lengths."""
    torch.manual_seed(0)
    pipe, truth = compiled(Around(causal), **options)
    for length in (6, 9, 12):
        compare(pipe, truth, sequences(length))
    return pipe, truth


def test_other_modes_between_training_steps() -> None:
    pipe, truth = ready()
    with torch.no_grad():
        compare(pipe, truth, sequences(7, 3))
    pipe.eval(), truth.eval()
    for length in (8, 11):
        compare(pipe, truth, sequences(length))
    pipe.train(), truth.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = sequences(14)
        torch.testing.assert_close(pipe(x), truth(x), rtol=2e-2, atol=2e-2)
    compare(pipe, truth, sequences(14))


def test_second_derivatives() -> None:
    pipe, truth = ready()
    for length in (7, 10):
        found = []
        for model in (pipe, truth):
            torch.manual_seed(length)
            x = sequences(length).requires_grad_()
            (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), x)[0])
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_copies_serve_all_lengths_too() -> None:
    pipe, truth = ready()
    for copied in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(copy.deepcopy(pipe)))):
        for length in (10, 13, 7):
            compare(copied, truth, sequences(length))


def test_what_a_pipeline_says_after_a_call_of_another_length() -> None:
    pipe, truth = ready()
    compare(pipe, truth, sequences(17))
    assert pipe.verify(sequences(15)).ok
    assert "x_dim1" in pipe.code
    assert pipe.explain()
    assert sum(len(stage.parameters) for stage in pipe.stages) == 4
    assert len(pipe.plan.stages) == 2


def test_a_plan_made_at_one_length_serves_others(tmp_path: Any, captures: list[int]) -> None:
    pipe, _ = ready()
    pipe.plan.save(tmp_path / "plan.json")
    plan = autopipe.Plan.load(tmp_path / "plan.json")
    torch.manual_seed(0)
    again, truth = Around(causal), Around(causal)
    truth.load_state_dict(again.state_dict())
    piped = autopipe.compile(again, devices=2, plan=plan)
    for length in (12, 9, 10):
        compare(piped, truth, sequences(length))
    assert [s.parameters for s in piped.stages] == [s.parameters for s in pipe.stages]


def test_a_length_that_does_not_fit_is_refused() -> None:
    pipe, truth = compiled(Around(torch.tanh), chunks=None, memory="40KB")
    for length in (6, 9, 12):
        compare(pipe, truth, sequences(length))
    with pytest.raises(autopipe.errors.MemoryLimitError, match="does not fit"):
        pipe(sequences(4000))
    compare(pipe, truth, sequences(10))


@pytest.mark.parametrize("marked", ["option", "tensor"])
def test_marked_beforehand(marked: str, captures: list[int]) -> None:
    torch.manual_seed(0)
    options = {"dynamic": {"x": {1: "length"}}} if marked == "option" else {}
    pipe, truth = compiled(Around(causal), **options)
    first = sequences(6)
    if marked == "tensor":
        torch._dynamo.mark_dynamic(first, 1)
    pipe(first)
    for length in (9, 12, 6):
        compare(pipe, truth, sequences(length))
    assert len(captures) == 1


def test_dropout_draws_what_a_pipeline_without_lengths_draws() -> None:
    torch.manual_seed(0)
    model = Around(lambda x: F.dropout(x, 0.5))
    pipe, other = (autopipe.compile(copy.deepcopy(model), devices=2, chunks=2) for _ in range(2))
    for length in (6, 9, 12):
        pipe(sequences(length))
    x, found = sequences(9), []
    for each in (pipe, other):
        torch.manual_seed(3)
        found.append(each(x))
    assert torch.equal(*found)
    assert not torch.equal(pipe(x), found[0])


@pytest.mark.parametrize("dense", [False, True])
def test_inputs_of_other_strides(dense: bool) -> None:
    pipe, truth = ready()
    for x in (
        torch.randn(4, WIDTH, 9).transpose(1, 2),
        torch.randn(9, 4, WIDTH).transpose(0, 1),
        sequences(20)[:, ::2],
        sequences(1).expand(4, 7, WIDTH),
    ):
        compare(pipe, truth, x.contiguous() if dense else x)


def test_threads_with_lengths_of_their_own() -> None:
    pipe, truth = ready()
    inputs = [sequences(length) for length in (6, 9, 17, 7, 8, 5)]
    found: dict[int, Tensor] = {}

    def call(i: int) -> None:
        with torch.no_grad():
            found[i] = pipe(inputs[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        torch.testing.assert_close(found[i], truth(x))
