"""The objective of a cut: its defaults, its policies, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autopipe.errors import OptionError
from autopipe.passes.devices import DEFAULT, H100, Device
from autopipe.passes.remat_policies import FULL, MIN_CUT, NONE, fraction_policy
from autopipe.passes.split.objective import Objective, objective_of


def objective(models: list[Device], **change: Any) -> Objective:
    K = len(models)
    plain = Objective(2, tuple(models), (NONE,) * K, (1,) * K, (None,) * K)
    return replace(plain, **change)


def test_a_stage_without_a_limit_gets_the_policy_that_recomputes_least() -> None:
    wanted = objective([DEFAULT] * 2, remat=((FULL, fraction_policy(0.5), MIN_CUT), FULL))
    assert (wanted.policies(0), wanted.policies(1)) == ((MIN_CUT,), (FULL,))
    limited = replace(wanted, limits=(1, 1))
    assert limited.policies(0) == (MIN_CUT, fraction_policy(0.5), FULL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "no such pipeline"),
        ({"devices": (), "remat": (), "in_flight": (), "limits": ()}, "no such pipeline"),
        ({"remat": (FULL,)}, "`remat`"),
        ({"remat": (FULL, "half")}, "`remat`"),
        ({"remat": (FULL, 1.5)}, "`remat`"),
        ({"remat": (FULL, "0.5")}, "`remat`"),
        ({"remat": (FULL, ())}, "`remat`"),
        ({"remat": (FULL, (NONE, "half"))}, "`remat`"),
        ({"in_flight": (1, 0)}, "`in_flight`"),
        ({"limits": (None, -1)}, "`limits`"),
        ({"state_bytes": -1}, "`state_bytes`"),
        ({"homes": (0,)}, "`homes`"),
        ({"homes": (0, -1)}, "`homes`"),
    ],
)
def test_wrong_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        objective([DEFAULT] * 2, **change)


def test_the_objective_without_limits() -> None:
    half = fraction_policy(0.5)
    found = objective_of([DEFAULT, H100], 3, remat=half, in_flight=[2, 1])
    assert found == Objective(3, (DEFAULT, H100), (half, half), (2, 1), (None, None))
    assert (found.stages, found.policies(0)) == (2, (half,))
