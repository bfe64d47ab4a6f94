"""The cut in time where buffers change: what is repeated reads the values that were read before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from autopipe.passes.ir.values import InputKind
from tests.support.agreement import assert_agrees, pipelined
from tests.support.once import pure_passes_once
from tests.support.phased import each_policy, parts, phase_nodes, saved_in
from tests.support.programs import phased_of, split_of

pytestmark = pytest.mark.few(2)


@pytest.fixture(scope="module", autouse=True)
def _once() -> Iterator[None]:
    """Tracing does not depend on the policy."""
    with pure_passes_once():
        yield


# ------------------------------------------------------------------------------- buffers


def test_old_statistics_are_kept_for_the_repetition() -> None:
    """The running mean is read, changed, and read again by R, which must see the old value."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.norm(x) * self.scale.clone())
            self.scale *= 1.5
            return x * x

    model, x = Centred(), torch.randn(4, 6)
    cut = split_of(model, 1, x)
    (stage,) = phased_of(cut, model, 4, ((x,), {}), remat="full").stages
    updated = {i.name for i in cut.stages[0].held if i.kind is InputKind.BUFFER}
    assert set(stage.updates) == updated
    old = [n for n in saved_in(stage) if n.op != "placeholder"]
    sources = {stage.state[parts(stage)["state"].index(n.args[0])] for n in old}
    assert "b_scale" in sources
    readers = {u for n in phase_nodes(stage, "RBW") for u in n.all_input_nodes}
    written = {
        h for h, n in zip(parts(stage)["state"], stage.state, strict=True) if n in stage.updates
    }
    assert not readers & written  # by then they hold new values


@each_policy
def test_a_buffer_that_changes_every_micro_batch(remat: str) -> None:
    """End to end: the gradient belongs to the value that the forward saw."""

    class Scheduled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.layer(x) * self.scale.clone())
            self.scale *= 1.5
            return torch.tanh(x * self.scale)

    model = Scheduled().double()
    model.scale = model.scale.double()
    pipe = pipelined(model, remat=remat, chunks=1)
    for _ in range(2):
        assert_agrees(pipe, torch.randn(4, 6, dtype=torch.float64))
    # three micro-batches are three steps of the schedule, one after another
    x = torch.randn(6, 6, dtype=torch.float64)
    expected, scale = [], model.scale.clone()
    for part in x.split(2):
        y = torch.tanh(model.layer(part) * scale)
        scale = scale * 1.5
        expected.append(torch.tanh(y * scale))
    want = torch.autograd.grad(torch.cat(expected).sum(), list(model.parameters()))
    model.zero_grad()
    pipelined(model, remat=remat, batch_norm="micro")(x).sum().backward()
    for p, g in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.scale, scale)
