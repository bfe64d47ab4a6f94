"""Random programs of integers, masks and indices: whoever mixes samples is refused.

The first batch is inert in one of several ways; the truth is what eager torch computes for many
other batches (`tests.support.random_mixing`).
"""

from __future__ import annotations

import os
from itertools import islice
from typing import Any

import pytest
import torch

from autopipe.errors import CouplingError
from tests.support.programs import captured_of
from tests.support.random_mixing import INERT, OPS, Mixer, Step, batch, mixes, random_mixer

FIRST = int(os.environ.get("AUTOPIPE_MIXERS", "0"))
"""The seed of the first program: another one draws others."""

CERTAIN = {"turned", "fill"}
"""Ops that are refused whatever the data are: a flip of floats, a source that is not batched."""


def verdict(model: Mixer, first: Any) -> bool:
    """Whether the model is refused."""
    try:
        captured_of(model, *first)
    except CouplingError:
        return True
    return False


def check(seeds: Any) -> list[str]:
    """The wrong verdicts on programs of these seeds; how many mix, and how many do not."""
    wrong, truths = [], []
    names = list(INERT)
    for seed in seeds:
        model, how = random_mixer(seed), names[seed % len(names)]
        truth = mixes(model)
        refused = verdict(model, INERT[how](batch(seed)))
        certain = any(s.name in CERTAIN for s in model.steps)
        if truth != refused and not (refused and certain):
            wrong.append(f"{seed}, {how}: {'mixes' if truth else 'refused'}, {model.steps}")
        truths.append(truth)
    assert 0 < sum(truths) < len(truths)
    return wrong


def test_random_programs_are_refused_if_they_mix_samples() -> None:
    assert check(range(FIRST, FIRST + 24)) == []


@pytest.mark.full
@pytest.mark.parametrize("part", range(4))
def test_more_random_programs_are_refused_if_they_mix_samples(part: int) -> None:
    first = FIRST + 24 + 100 * part
    assert check(range(first, first + 100)) == []


@pytest.mark.parametrize("seed", [53, 630, 703, 1577, 2815])
def test_programs_that_only_the_range_of_integers_tells(seed: int) -> None:
    """They differ between slices only if the samples' largest or smallest integers differ."""
    model, names = random_mixer(seed), list(INERT)
    assert mixes(model)
    assert verdict(model, INERT[names[seed % len(names)]](batch(seed)))


def test_the_truth_sees_what_mixes() -> None:
    """By hand: ops that certainly mix samples, and ops that certainly do not."""
    for name in ("sorted", "from any", "fill", "gated sorted"):
        kinds = OPS[name][0]
        assert mixes(Mixer([Step(name, (-1,) * len(kinds), 1)])), name
    for name in ("sorted and back", "added back", "from own sample", "scale"):
        kinds = OPS[name][0]
        assert not mixes(Mixer([Step(name, (-1,) * len(kinds), 1)])), name


def test_inert_batches_are_inert() -> None:
    """Sorting by id does nothing to them, in slices or as a whole."""
    model = Mixer([Step("sorted", (-1, -1), 0)])
    for how in ("equal ids", "zeros", "sorted ids"):
        given = INERT[how](batch(1))
        whole = model(*given)
        parts = [model(*p) for p in islice(zip(*(g.split(2) for g in given), strict=True), 9)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
