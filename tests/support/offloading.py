"""Small models offload only if small tensors do."""

from __future__ import annotations

import dataclasses

import pytest

from autopipe.passes import remat_policies
from autopipe.passes.remat_policies import SaveOnHost
from autopipe.planning import offloading


def offload_all(monkeypatch: pytest.MonkeyPatch, least: int = 0) -> None:
    """Let ``remat="offload"`` offload tensors of any size.

    Args:
        monkeypatch: of the test.
        least: bytes of the smallest that it offloads.
    """
    policies = tuple(
        dataclasses.replace(p, least=least) if isinstance(p, SaveOnHost) else p
        for p in remat_policies.POLICIES
    )
    for module in (remat_policies, offloading):
        monkeypatch.setattr(module, "POLICIES", policies)
