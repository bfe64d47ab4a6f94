"""Every operator that torch knows, as a pipeline: eager torch's results, or samples are mixed.

    AUTOPIPE_OPERATORS=all pytest tests/test_operators.py

takes every dimension of every sample input in torch's operator database for the batch (hours);
a number instead of "all" takes that many sample inputs of each operator. Without it every run
takes the same one case of each. To look into one: ``judge(Case(...))`` of
`tests.support.operators`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autopipe.passes.batch.propagate import RULES
from autopipe.passes.batch.rules_math import pointwise
from tests.support.operators import OPERATORS, Case, Outcome, Verdict, cases_of, judge, keeps_apart

ASKED = os.environ.get("AUTOPIPE_OPERATORS", "")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.few(20)]

BY_DESIGN = {
    "nn.functional.batch_norm": "normalised by the statistics of a micro-batch, as in GPipe",
    **dict.fromkeys(
        ("empty_like", "new_empty", "new_empty_strided", "resize_", "resize_as_"),
        "whatever stands in memory",
    ),
}
"""Operators that may compute something else than eager torch, and why."""

NOTHING = "arguments by which it does nothing to the batch: rolled by 0, a kernel of 1, no entries"
CHANCE = "by chance, or by what the values of the sample inputs have in common"
INTEGERS = "no rule for it, and what makes integers, or several results, is not tried"
SUMS = "no rule for how its sum over the batch is put together"
PLACE = "the batch where channels, positions or queries are"


def _each(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


REFUSED = {
    **_each(
        NOTHING,
        "_upsample_bilinear2d_aa diff fft.fftn fft.hfftn fft.ifftn fft.ihfftn fft.irfftn fft.rfftn"
        " flip narrow narrow_copy nn.functional.pad.replicate_negative"
        " nn.functional.pixel_shuffle nn.functional.pixel_unshuffle repeat repeat_interleave roll"
        " split_with_sizes_copy tensor_split tile unflatten",
    ),
    **_each(
        CHANCE,
        "bincount histc linalg.matrix_rank linalg.norm.subgradients_at_zero linalg.pinv"
        " masked.argmax masked.argmin nn.functional.pdist nonzero_static prod"
        " torch.ops.aten._safe_softmax.default unique unique_consecutive",
    ),
    **_each(
        INTEGERS,
        "argwhere linalg.solve_ex meshgrid.list_of_tensors meshgrid.variadic_tensors nonzero"
        " triangular_solve",
    ),
    **_each(SUMS, "linalg.vecdot linalg.vector_norm nanmean sum_to_size"),
    **_each(
        PLACE,
        "nn.functional.adaptive_avg_pool1d nn.functional.adaptive_avg_pool2d"
        " nn.functional.adaptive_avg_pool3d nn.functional.batch_norm nn.functional.conv1d"
        " nn.functional.conv2d nn.functional.conv3d nn.functional.conv_transpose1d"
        " nn.functional.conv_transpose2d nn.functional.conv_transpose3d"
        " nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool3d"
        " nn.functional.instance_norm nn.functional.local_response_norm"
        " nn.functional.scaled_dot_product_attention nn.functional.unfold",
    ),
}
"""Operators some of whose calls are refused although they keep samples apart, and why."""


def outcomes(name: str) -> list[Outcome]:
    """What becomes of the cases asked for, or of the first that eager torch can do."""
    if ASKED:
        most = None if ASKED == "all" else int(ASKED)
        return [o for c in cases_of(name, most) if (o := judge(c)) is not None]
    found = (judge(c, chunks=(3,)) for c in cases_of(name, 4, 1))
    first = next((o for o in found if o is not None), None)
    return [] if first is None else [first]


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_eagers_or_refused(name: str) -> None:
    wrong = {Verdict.CRASH}
    if name not in BY_DESIGN:
        wrong.add(Verdict.WRONG)
    if name not in REFUSED:
        wrong.add(Verdict.APART)
    failed = [o for o in outcomes(name) if o.verdict in wrong]
    assert not failed, "\n".join(map(str, failed))


def test_operators_that_are_listed_exist_or_did() -> None:
    """In one torch or another."""
    known = {n.split(".")[0] for n in OPERATORS} | {"torch"}
    assert {n.split(".")[0] for n in (*REFUSED, *BY_DESIGN)} <= known


class Applies(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.function(x),)


ORACLE: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "entry by entry": (lambda x: x.sin(), True),
    "sum": (lambda x: x.sum(), True),
    "mean": (lambda x: x.mean(0), True),
    "turned": (lambda x: x.t(), True),
    "along each sample": (lambda x: x.softmax(1), True),
    "along the batch": (lambda x: x.softmax(0), False),
    "maximum": (lambda x: x.max(), False),
    "every pair": (lambda x: x @ x.T, False),
    "the other way round": (lambda x: x.flip(0), False),
    "place": (lambda x: x * torch.arange(x.shape[0])[:, None], False),
    "number": (lambda x: x / x.shape[0], False),
}


@pytest.mark.parametrize("name", ORACLE)
def test_the_oracle_knows_what_everyone_knows(name: str) -> None:
    function, apart = ORACLE[name]
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert keeps_apart(Applies(function), [x], [0], (function(x),)) is apart


def test_a_mistake_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same judge, where a rule says what is not so."""
    case = Case("softmax", 1, (0,), copied=True)
    outcome = judge(case)
    assert outcome is not None
    assert outcome.verdict is Verdict.COUPLED
    monkeypatch.setitem(RULES, torch.ops.aten.softmax, pointwise)
    outcome = judge(case)
    assert outcome is not None
    assert outcome.verdict is Verdict.WRONG
