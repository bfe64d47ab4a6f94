"""The cache of traces: what it keeps of one program, and what it lets go."""

from __future__ import annotations

import torch

from autopipe.passes.phases.cut import cut_phases
from autopipe.passes.phases.request import TraceCache
from autopipe.passes.remat_policies import parse_policy
from autopipe.tensor_meta import training_request
from tests.support.phased import Layers
from tests.support.programs import CPU, split_of

X = torch.randn(4, 6)
FULL, NONE = parse_policy("full"), parse_policy("none")


def test_a_restricted_cache_serves_the_same_request_only() -> None:
    model = Layers(4)
    split = split_of(model, 2, X)
    cache = TraceCache()
    full = training_request(model, split, [X], [2], [CPU] * 2, [FULL] * 2)
    none = training_request(model, split, [X], [2], [CPU] * 2, [NONE] * 2)
    chosen, other = cut_phases(full, 2, cache), cut_phases(none, 2, cache)
    assert len(cache.joints) == 2
    assert len(cache.stages) == 4
    kept = cache.restricted_to([chosen])
    assert kept.joints == {}
    assert {id(s.graph) for found in kept.stages.values() for s in found} == {
        id(s.graph) for s in chosen.stages
    }
    again = cut_phases(full, 2, kept)
    assert [s.graph for s in again.stages] == [s.graph for s in chosen.stages]
    assert kept.joints == {}  # nothing was traced
    new = cut_phases(none, 2, kept)
    assert len(kept.joints) == 2
    assert str(new) == str(other)
