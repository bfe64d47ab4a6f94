"""How micro-batch results become the batch's: every rule against eager on the whole batch.

Covers batch/combine_outputs.py, batch/epilogue_cut.py and batch/rules_losses.py.

A batch of seven in three micro-batches (3, 2, 2), two stages, double precision: a mean of means,
or a mean over what is not ignored, would be off in the first digit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopipe.errors import CaptureError
from autopipe.passes.ir.combine import Concatenate
from tests.support.agreement import assert_agrees, pipelined
from tests.support.combining import BATCH, C, Model, agrees, inputs
from tests.support.programs import captured_of

WEIGHT = torch.linspace(0.2, 2.0, C, dtype=torch.float64)

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("double", "traces_once")]


def combinations(model: nn.Module, *args: Any) -> list[str]:
    return [str(o.combine) for o in captured_of(model, *args).outputs]


# ------------------------------------------------------------------------------- sums and means


REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": lambda y: y.mean(),
    "sum": lambda y: y.sum(),
    "mean of means": lambda y: y.mean(1).mean(),
    "mean over the batch": lambda y: y.mean(0),
    "sum over the batch, kept": lambda y: y.sum(0, keepdim=True),
    "mean of a flat view": lambda y: y.reshape(-1).mean(),
    "mean of what a sample repeats": lambda y: y[:, None].expand(-1, 3, -1).mean(),
    "mse": lambda y: F.mse_loss(y, y.detach() * 2 + 1),
    "mse, summed": lambda y: F.mse_loss(y, y.detach() * 2 + 1, reduction="sum"),
    "l1": lambda y: F.l1_loss(y, y.detach() * 2 + 1),
    "huber": lambda y: F.huber_loss(y, y.detach() * 2 + 1),
    "binary cross entropy": lambda y: F.binary_cross_entropy(y.sigmoid(), y.detach().sigmoid()),
    "with logits": lambda y: F.binary_cross_entropy_with_logits(y, y.detach().sigmoid()),
    "divergence per sample": lambda y: F.kl_div(
        y.log_softmax(-1), y.detach().square().softmax(-1), reduction="batchmean"
    ),
    "triplet": lambda y: F.triplet_margin_loss(y, y * 2, y + 3),
    "covariance": lambda y: y.T @ y,
    "covariance by einsum": lambda y: torch.einsum("bi,bj->ij", y, y.sin()),
    "weighted sum of samples": lambda y: y[:, 0] @ y,
    "share of classes": lambda y: (y.softmax(-1).mean(0) * F.one_hot(y.argmax(-1), C).sum(0)).sum(),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str) -> None:
    agrees(REDUCTIONS[name])


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "exp of a mean": lambda y: y.mean().exp(),
    "root of a sum of squares": lambda y: y.square().sum().sqrt(),
    "weighted sum of two losses": lambda y: 0.3 * y.square().mean() + 0.7 * y.abs().sum(),
    "product of two losses": lambda y: (y.mean() + 1) * y.sum(),
    "ratio of sums": lambda y: (y * (y > 0)).sum() / (y > 0).sum(),
    "sum by the number of samples": lambda y: y.sum() / y.shape[0],
    "sum times one by that number": lambda y: y.sum() * (1 / y.shape[0]),
    "several results": lambda y: (y.mean(), y, y.sum() + y.mean(), y.argmax(-1)),
    "share of hits": lambda y: y.mean() + (y.argmax(-1) == 0).double().mean(),
    "a reduced value twice": lambda y: (lambda m: (m, m * 2))(y.mean()),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_on_reduced_values_is_the_whole_batchs(name: str) -> None:
    agrees(ARITHMETIC[name])


def test_parameters_used_after_the_reduction() -> None:
    class Head(Model):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.body(self.body(x).mean(0)).square().sum()

    pipe = pipelined(Head(lambda: None))
    assert_agrees(pipe, inputs())


def test_a_penalty_that_does_not_depend_on_the_batch() -> None:
    class Penalised(Model):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            penalty = sum(p.square().sum() for p in self.body.parameters())
            return self.body(x).mean() + 0.1 * penalty

    pipe = pipelined(Penalised(lambda: None))
    assert_agrees(pipe, inputs())


def test_the_rule_of_each_result() -> None:
    model = Model(lambda y: (y, y.sum(), y.mean(), torch.ones(3)))
    assert combinations(model, inputs()) == ["cat", "sum", "mean", "same"]


def test_results_are_concatenated_where_the_batch_is() -> None:
    model = Model(lambda y: (y, y.t(), y[None].expand(2, -1, -1)))
    captured = captured_of(model, inputs())
    assert [o.combine for o in captured.outputs] == [Concatenate(d) for d in (0, 1, 1)]
    agrees(model.f)


# ------------------------------------------------------------------------------- cross entropy


def targets(size: int = BATCH) -> Tensor:
    return torch.randint(0, C, (size,))


def sparse_targets() -> Tensor:
    """The first micro-batch has nothing to count, the second one target, the third all."""
    labels = targets()
    labels[:4] = -100
    return labels


CROSS_ENTROPIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "class weights": {"weight": WEIGHT},
    "label smoothing": {"label_smoothing": 0.1},
    "class weights, label smoothing": {"weight": WEIGHT, "label_smoothing": 0.1},
    "another ignored class": {"ignore_index": 2},
    "another ignored class, weights": {"ignore_index": 2, "weight": WEIGHT},
}


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
@pytest.mark.parametrize("make", [targets, sparse_targets])
def test_cross_entropy(name: str, make: Callable[[], Tensor]) -> None:
    options = CROSS_ENTROPIES[name]
    labels = make()
    if "ignore_index" in options:
        labels = torch.where(labels < 0, options["ignore_index"], labels)
    agrees(lambda y, t: F.cross_entropy(y, t, **options), labels)


def test_cross_entropy_with_nothing_to_count_at_all() -> None:
    """Nothing divided by nothing, as in eager: nan, and nan for every gradient."""
    pipe = pipelined(Model(lambda y, t: F.cross_entropy(y, t)))
    found = assert_agrees(pipe, inputs(), torch.full((BATCH,), -100))
    assert found.isnan()


@pytest.mark.xfail(
    torch.__version__ < "2.13",
    strict=True,
    raises=CaptureError,
    reason="the fake of this loss fixes the batch size before torch 2.13: the model is refused",
)
@pytest.mark.parametrize(
    "name", ["plain", "sum", "class weights", "class weights, label smoothing"]
)
def test_cross_entropy_with_probabilities_as_target(name: str) -> None:
    options = CROSS_ENTROPIES[name]
    agrees(lambda y, t: F.cross_entropy(y, t, **options), torch.rand(BATCH, C).softmax(-1))


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_cross_entropy_of_every_position(weight: Tensor | None) -> None:
    """Targets of shape (batch, positions), of which each sample ignores another number."""
    labels = torch.randint(0, C, (BATCH, 4))
    for n in range(BATCH):
        labels[n, : n % 5] = -100

    def loss(y: Tensor, t: Tensor) -> Tensor:
        logits = torch.stack([y, y * 2, y + 1, y.sin()], -1)
        return F.cross_entropy(logits, t, weight=weight)

    agrees(loss, labels)


def test_cross_entropy_of_flat_positions() -> None:
    """As language models do it: (batch, positions, classes) flattened, shifted by one."""
    labels = torch.randint(0, C, (BATCH, 4))
    labels[:3] = -100

    def loss(y: Tensor, t: Tensor) -> Tensor:
        logits = torch.stack([y, y * 2, y + 1, y.sin()], 1)
        return F.cross_entropy(logits[:, :-1].reshape(-1, C), t[:, 1:].reshape(-1))

    agrees(loss, labels)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_negative_log_likelihood(weight: Tensor | None) -> None:
    agrees(lambda y, t: F.nll_loss(y.log_softmax(-1), t, weight=weight), sparse_targets())


def test_weights_that_are_learned() -> None:
    class Weighted(Model):
        def __init__(self) -> None:
            super().__init__(lambda: None)
            self.weight = nn.Parameter(WEIGHT.clone())

        def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
            return F.cross_entropy(self.body(x), t, weight=self.weight.detach().exp())

    assert_agrees(pipelined(Weighted()), inputs(), sparse_targets())
