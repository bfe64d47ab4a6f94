"""Sums of gradients that stay where they are: whose they are, and when they are zero."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from autopipe.runtime.gradient_sums import GradientSums
from autopipe.runtime.graphs.kept_sums import KeptSums
from autopipe.runtime.graphs.observed import TensorLayout

CPU = torch.device("cpu")
LAYOUTS = {0: TensorLayout((2,), (0,), torch.float32), 2: TensorLayout((), (), torch.float64)}
NAMES = ("a", "b", "c")
STAGE = 3


class FakeRun(SimpleNamespace):
    """As much of a run as has gradients."""

    __hash__ = object.__hash__


def run() -> Any:
    return FakeRun(gradients=GradientSums())


def totals(of: Any) -> list[Any]:
    return [
        None if t is None else t.tolist() for t in of.gradients.totals(dict.fromkeys("abc", CPU))
    ]


def test_a_run_gets_zeros_and_keeps_a_copy() -> None:
    kept, first, second = KeptSums(STAGE, CPU, NAMES), run(), run()
    sums = kept.of(LAYOUTS)
    assert (sums[0].stride(), sums[2].dtype) == ((1,), torch.float64)
    assert kept.claim(first, LAYOUTS)
    for n in (1, 2):
        assert kept.claim(first, LAYOUTS)  # and they are zeroed no more
        sums[0] += n
    kept.hand_over(first)
    assert kept.claim(second, [0])
    sums[0] += 5
    assert kept.claim(second, [2])
    kept.hand_over(second)
    assert totals(first) == [[3, 3], None, 0]
    assert totals(second) == [[5, 5], None, 0]
    assert kept.of(LAYOUTS)[0] is sums[0]


def test_one_run_at_a_time() -> None:
    kept, first, second = KeptSums(STAGE, CPU, NAMES), run(), run()
    kept.of(LAYOUTS)
    assert kept.claim(first, [0])
    assert not kept.claim(second, [0])
    kept.hand_over(second)  # has none
    del first  # its backward failed
    assert kept.claim(second, [0])


def test_what_has_begun_elsewhere_goes_on_there() -> None:
    kept, one = KeptSums(STAGE, CPU, NAMES), run()
    kept.of(LAYOUTS)
    one.gradients.add("a", STAGE, torch.ones(2))
    assert not kept.claim(one, [0])
    assert kept.claim(one, [2])


def test_what_runs_eagerly_adds_to_the_same_sum() -> None:
    kept, one = KeptSums(STAGE, CPU, NAMES), run()
    sums = kept.of(LAYOUTS)
    assert kept.claim(one, [0])
    one.gradients.add("a", STAGE, torch.ones(2))
    sums[0] += 1
    kept.hand_over(one)
    assert totals(one)[0] == [2, 2]
