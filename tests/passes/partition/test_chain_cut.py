"""The cut of one order over equal devices, against brute force over all cuts."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopipe.errors import OptionError, PartitionError
from autopipe.passes.partition.chain_cut import cut_chain
from tests.support.partitions import largest


def weight(crossing: Sequence[float], starts: Sequence[int]) -> Fraction:
    return sum((Fraction(crossing[p]) for p in starts), Fraction(0))


def check(
    seconds: Sequence[float],
    K: int,
    crossing: Sequence[float] | None = None,
    slack: float = 0.0,
) -> None:
    """`cut` gives one of the cuts that brute force, in exact arithmetic, finds best."""
    cuts = list(combinations(range(1, len(seconds)), K - 1))
    if not cuts:
        with pytest.raises(PartitionError):
            cut_chain(seconds, K, crossing=crossing, slack=slack)
        return
    starts = cut_chain(seconds, K, crossing=crossing, slack=slack)
    assert starts in cuts
    optimum = min(largest(seconds, c) for c in cuts)
    if crossing is None:
        assert largest(seconds, starts) == optimum
        return
    limit = optimum * (1 + Fraction(slack))
    assert largest(seconds, starts) <= limit
    within = [c for c in cuts if largest(seconds, c) <= limit]
    least = min(weight(crossing, c) for c in within)
    assert weight(crossing, starts) == least
    ties = [c for c in within if weight(crossing, c) == least]
    best = min(largest(seconds, c) for c in ties)
    assert largest(seconds, starts) <= best + optimum / 1024
    if slack == 0:
        assert starts == min(ties)


def test_cut_is_optimal_for_every_small_case() -> None:
    for N in range(1, 6):
        for seconds in product((0.0, 1.0, 3.0), repeat=N):
            for K in range(1, N + 2):
                check(seconds, K)


def test_cut_is_optimal_where_neighbouring_integers_differ() -> None:
    """Small whole costs: a search that steps over one integer gives the wrong optimum."""
    generator = random.Random(0)
    for _ in range(400):
        N = generator.randint(4, 9)
        check([float(generator.randint(1, 20)) for _ in range(N)], generator.randint(2, N))


def test_cut_is_optimal_for_every_number_of_stages() -> None:
    seconds = (2.0, 0.1, 0.2, 3.0, 0.3, 1.0)
    crossing = (9.0, 2.0, 1.0, 1.0, 3.0, 0.0, 9.0)
    for K in range(1, 7):
        check(seconds, K)
        check(seconds, K, crossing, 0.25)


costs = st.one_of(
    st.integers(0, 5).map(float),
    st.sampled_from([0.1, 0.2, 0.3, 0.7]),
    st.floats(0, 1e3, allow_nan=False),
    st.sampled_from([5e-324, 1e-300, 1e-17, 1e300]),
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], int, list[float] | None]:
    N = draw(st.integers(1, 9))
    seconds = draw(st.lists(costs, min_size=N, max_size=N))
    weights = st.lists(st.integers(0, 3).map(float) | costs, min_size=N + 1, max_size=N + 1)
    K = draw(st.integers(1, N))
    return seconds, K, draw(st.none() | weights)


@settings(max_examples=300, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.0, 0.1, 0.5, 3.0, 1e300]))
def test_cut_agrees_with_brute_force(
    problem: tuple[list[float], int, list[float] | None], slack: float
) -> None:
    seconds, K, crossing = problem
    check(seconds, K, crossing, slack)


def test_every_stage_gets_an_item_even_when_all_cost_nothing() -> None:
    assert cut_chain([0.0] * 4, 4) == (1, 2, 3)
    assert cut_chain([1.0, 0.0, 0.0], 3) == (1, 2)
    assert cut_chain([0.0, 0.0, 1.0], 3, crossing=[0.0] * 4) == (1, 2)


def test_integers_longer_than_a_float_are_not_rounded() -> None:
    assert cut_chain([2**60 + 1, 2**60, 1], 2, crossing=[0] * 4) == (1,)
    assert cut_chain([2**60, 2**60 - 1, 1, 1], 2) == (1,)


def test_one_stage_needs_no_cut() -> None:
    assert cut_chain([1.0, 2.0], 1) == ()
    assert cut_chain([1.0], 1, crossing=[5.0, 5.0], slack=1.0) == ()


def test_crossing_decides_between_equal_cuts_and_slack_buys_more() -> None:
    seconds = [1.0] * 6
    crossing = [0.0, 9.0, 9.0, 5.0, 1.0, 9.0, 0.0]
    assert cut_chain(seconds, 2, crossing=crossing) == (3,)
    assert cut_chain(seconds, 2, crossing=crossing, slack=0.34) == (4,)


def test_slack_is_not_spent_for_nothing() -> None:
    assert cut_chain([1.0] * 64, 4, crossing=[1.0] * 65, slack=0.5) == (16, 32, 48)


def test_the_optimum_is_feasible_for_the_second_criterion_whatever_the_rounding() -> None:
    seconds = [0.1] * 10  # prefix sums of floats would give stages of "unequal" cost
    assert cut_chain(seconds, 5, crossing=[1.0] * 11) == (2, 4, 6, 8)


def test_the_ends_of_weights_are_ignored() -> None:
    assert cut_chain([1.0, 1.0], 2, crossing=[math.nan, 1.0, math.inf]) == (1,)


def test_too_many_stages_say_how_many_are_possible() -> None:
    with pytest.raises(PartitionError, match=r"4 stages requested, 3 possible"):
        cut_chain([1.0] * 3, 4)
    with pytest.raises(PartitionError, match=r"1 stages requested, 0 possible"):
        cut_chain([], 1)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (([1.0], 0), {}),
        (([1.0], -1), {}),
        (([1.0, math.nan], 1), {}),
        (([1.0, -1.0], 1), {}),
        (([1.0, math.inf], 1), {}),
        (([1.0, 1.0], 2), {"crossing": [0.0] * 2}),
        (([1.0, 1.0], 2), {"crossing": [0.0, math.nan, 0.0]}),
        (([1.0, 1.0], 2), {"crossing": [0.0, -1.0, 0.0]}),
        (([1.0, 1.0], 2), {"slack": -0.1}),
        (([1.0, 1.0], 2), {"slack": math.nan}),
    ],
)
def test_cut_refuses_what_is_no_cost(
    arguments: tuple[list[float], int], options: dict[str, list[float]]
) -> None:
    with pytest.raises(OptionError):
        cut_chain(*arguments, **options)  # type: ignore[arg-type]


def test_large_problems_are_quick() -> None:
    generator = random.Random(0)
    seconds = [generator.lognormvariate(0, 1) for _ in range(20_000)]
    crossing = [generator.random() for _ in range(5_001)]
    began = time.perf_counter()
    starts = cut_chain(seconds, 64)
    second = cut_chain(seconds[:5_000], 16, crossing=crossing, slack=0.05)
    assert time.perf_counter() - began < 20  # takes 0.1 s; quadratic code takes minutes
    assert float(largest(seconds, starts)) < 1.01 * sum(seconds) / 64
    assert len(second) == 15
