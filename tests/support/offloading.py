"""Small models offload only if small tensors do."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence

import pytest
from torch import Tensor

from autopipe.passes import remat_policies
from autopipe.passes.remat_policies import SaveOnHost
from autopipe.planning import offloading
from autopipe.runtime import saved_values
from autopipe.runtime.offload import (
    HostCopies,
    Offloaded,
    all_bytes,
    leaving_storages,
    replaced,
)
from autopipe.runtime.transfer import SentTensor


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


class Moved(HostCopies):
    """Copies on a CPU worker, where the runtime has no need of them.

    What was copied is overwritten with ones: whoever else still reads it gets wrong numbers.
    """

    def offload(self, tensors: Sequence[Tensor], stays: Container[int], least: int) -> Offloaded:
        leaving = leaving_storages(tensors, self._worker.device, stays, least)
        copies = {}
        for address, one in leaving.items():
            flat = all_bytes(one)
            copies[address] = SentTensor(flat.clone(), None)
            flat.fill_(0xFF)
        return replaced(tensors, copies, sum(one.nbytes for one in leaving.values()))

    def fetch(self, offloaded: Offloaded) -> Offloaded:
        copies = {a: SentTensor(x.clone(), None) for a, (x, _) in offloaded.copies.items()}
        return offloaded._replace(copies=copies)


def copy_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CPU workers copy what they offload, and overwrite it."""
    monkeypatch.setattr(saved_values, "HostCopies", Moved)
