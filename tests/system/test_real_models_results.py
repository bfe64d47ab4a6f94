"""Results that are something else too: a middle value, an input, a view.

Truth is eager torch on the whole batch, in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.breakers import STAGES, Body, Net, piped, sample

pytestmark = [pytest.mark.few(4), pytest.mark.usefixtures("alike_models_once")]


def middle(net: Net, x: Tensor) -> Tensor:
    return torch.tanh(net.layers[0](x))


RESULTS: dict[str, Body] = {
    "an input": lambda net, x: (net.deep(x), x),
    "a view of an input": lambda net, x: (net.deep(x), x[:, 2:], x.view(-1, 2, 3)),
    "another result": lambda net, x: (lambda h: {"a": h, "b": [h, h]})(net.deep(x)),
    "a view of another result": lambda net, x: (lambda h: (h, h[:, 1:], h.t()))(net.deep(x)),
    "a middle value and its view": lambda net, x: (lambda h: (net.deep(h, 1), h, h.view(-1, 2, 3)))(
        middle(net, x)
    ),
    "a detached one": lambda net, x: (lambda h: (h, h.detach(), h.detach()[:, 1:]))(net.deep(x)),
    "a parameter": lambda net, x: (net.deep(x), net.matrix),
    "a parameter that is used": lambda net, x: (net.deep(x) @ net.matrix, net.matrix),
    "a view of a parameter": lambda net, x: (net.deep(x) @ net.matrix, net.matrix.t()[1:]),
    "a penalty on parameters": lambda net, x: (
        net.deep(x) @ net.matrix,
        sum(p.pow(2).sum() for p in net.parameters()),
    ),
    "a buffer": lambda net, x: (net.deep(x) * net.vector, net.vector),
    "a constant": lambda net, x: (net.deep(x) * net.constant, net.constant, torch.arange(3)),
    "no tensors": lambda net, x: (net.deep(x), 3, None, "text", True, [2.5]),
}


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", RESULTS)
def test_results_that_are_something_else_too(name: str, remat: str) -> None:
    """Gradients from all of them add up: a parameter's own counts once, not per micro-batch."""
    piped(RESULTS[name], sample(), remat=remat)


@pytest.mark.parametrize("name", ["an input", "a parameter"])
def test_a_result_that_is_an_object_of_the_caller_is_that_object(name: str) -> None:
    pipe, x = piped(RESULTS[name], sample()), sample()
    assert pipe(x)[1] is (x if name == "an input" else pipe.model.matrix)


def test_a_middle_value_and_its_view_come_from_a_middle_stage() -> None:
    pipe = piped(RESULTS["a middle value and its view"], sample())
    returned = [b.source for s in pipe.stages for b in s.outputs if b.returned]
    assert min(k for k in returned if k is not None) < STAGES - 1
