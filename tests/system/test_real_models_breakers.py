"""What breaks pipelines of real models elsewhere, one difficulty each, with the cut where it hurts.

Truth is eager torch on the whole batch, in float64. Each test also looks at the stages, to see that
the difficult value truly crosses from one to another.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopipe.errors import CouplingError
from tests.support.agreement import assert_agrees, objective, pipelined
from tests.support.breakers import (
    BATCH,
    REMATS,
    STAGES,
    WIDTH,
    Body,
    Net,
    crossing,
    piped,
    random,
    sample,
)

pytestmark = [pytest.mark.few(1), pytest.mark.usefixtures("alike_models_once")]

# ------------------------------------------------------------------------------- inputs


def late(net: Net, x: Tensor, mask: Tensor, step: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """A mask and a timestep for the last layers, labels for the loss."""
    x = net.deep(x)
    x = x.masked_fill(mask, 0.5) * torch.cos(step.double())[:, None]
    return {"logits": x, "loss": F.cross_entropy(x, labels)}


@pytest.mark.parametrize("remat", REMATS)
def test_inputs_that_only_a_later_stage_uses(remat: str) -> None:
    mask = random(BATCH, WIDTH, seed=2) > 1
    step, labels = torch.arange(BATCH), torch.arange(BATCH) % WIDTH
    labels[2] = -100
    starts = ("linear_2", "masked_fill")
    pipe = piped(late, sample(), mask=mask, step=step, labels=labels, remat=remat, starts=starts)
    received = [[b.name for b in s.inputs if b.kind == "input"] for s in pipe.stages]
    assert [len(names) for names in received] == [1, 0, 3]


ORDERS: dict[str, tuple[Body, tuple[str, str]]] = {
    "second first": (lambda net, a, b, c: net.deep(b) - a.exp() * c, ("linear_2", "exp")),
    "last first": (
        lambda net, a, b, c: net.deep(c, 2) + net.deep(b, 3) * 2 - a,
        ("linear_2", "mul"),
    ),
    "each by a layer": (
        lambda net, a, b, c: (
            torch.tanh(net.layers[0](c)) @ net.matrix
            + net.deep(torch.tanh(net.layers[1](b)) - a, 2)
        ),
        ("linear_1", "linear_2"),
    ),
}


@pytest.mark.parametrize("names", ["positions", "names"])
@pytest.mark.parametrize("order", ORDERS)
def test_inputs_of_equal_shapes_used_in_another_order(order: str, names: str) -> None:
    """Not in the signature's: swapped inputs would give other numbers and no error."""
    a, b, c = sample(1), sample(2), sample(3)
    body, starts = ORDERS[order]
    if names == "positions":
        pipe = piped(body, a, b, c, starts=starts)
    else:
        pipe = piped(body, c=c, a=a, b=b, starts=starts)
    users = {b.name: b.targets for s in pipe.stages for b in s.inputs if b.kind == "input"}
    assert len(set(users.values())) > 1, "different stages use them"


def test_keywords_in_another_order() -> None:
    """To Python they are the same call; a batch is often a dict with no particular order."""
    pipe = piped(lambda net, a, b: net.deep(a) - 2 * b, a=sample(1), b=sample(2))
    assert_agrees(pipe, b=sample(3), a=sample(4))


class Frequent(nn.Module):
    """Gradients of a token are divided by how often the batch has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, WIDTH, scale_grad_by_freq=True)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.table(ids)))


def test_gradients_that_count_the_batch_in_one_micro_batch() -> None:
    assert_agrees(pipelined(Frequent(), chunks=1), torch.arange(21).view(7, 3) % 5)


def test_gradients_that_count_the_batch_are_refused() -> None:
    """The samples meet in the backward only."""
    with pytest.raises(CouplingError):
        pipelined(Frequent())(torch.arange(21).view(7, 3) % 5).sum().backward()


# ------------------------------------------------------------------------------- regions


def rotary(net: Net, x: Tensor) -> Tensor:
    """As rotary embeddings do: angles under no_grad, made first and used by every layer."""
    with torch.no_grad():
        angles = x.sum(1, keepdim=True) * net.vector
        cos, sin = angles.cos(), angles.sin()
    for layer in net.layers:
        x = torch.tanh(layer(x))
        x = x * cos + x.roll(1, -1) * sin
    return x


def between(net: Net, x: Tensor) -> Tensor:
    """A region in the middle, of a value and of parameters, used on both sides of it."""
    x = torch.tanh(net.layers[0](x))
    with torch.no_grad():
        scale = (x @ net.matrix).abs().amax(1, keepdim=True)
        offset = net.matrix.sum(0)
    y = net.deep(x / scale, 1)
    return torch.tanh(y * scale + x) + offset


def gradients_again(net: Net, x: Tensor) -> Tensor:
    """Gradients on, inside of gradients off."""
    with torch.no_grad():
        hidden = torch.tanh(net.layers[0](x))
        with torch.enable_grad():
            kept = torch.tanh(net.layers[1](hidden) * x)
        lost = kept * 2
    return net.deep(kept, 2) + lost


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("body", [rotary, between, gradients_again])
def test_regions_without_gradients(body: Body, remat: str) -> None:
    pipe = piped(body, sample(), remat=remat)
    across = [b for b, _ in crossing(pipe) if b.kind == "activation"]
    assert len(across) > STAGES - 1, "more than one layer's value crosses"


def test_a_rotary_embedding_crosses_to_every_stage() -> None:
    pipe = piped(rotary, sample())
    shared = [b.name for b, _ in crossing(pipe) if b.targets == (1, 2)]
    assert len(shared) >= 1, "cos and sin, or the angles that they are made of"


def half(net: Net, x: Tensor) -> Tensor:
    """A region of bfloat16 from the first layer on, then one without, then with again."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        early = net.layers[0](x)
        x = torch.tanh(net.layers[1](early))
    x = torch.tanh(net.layers[2](x.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (net.layers[3](x) * early).float()


def whole(net: Net, x: Tensor) -> Tensor:
    """As rotary embeddings do: no autocast for the angles, whatever is on outside."""
    x = torch.tanh(net.layers[0](x))
    with torch.autocast("cpu", enabled=False):
        angles = x.float() @ net.matrix
    x = torch.tanh(net.layers[1](x) * angles.cos())
    x = torch.tanh(net.layers[2](x))
    with torch.autocast("cpu", enabled=False):
        last = x.float() @ net.matrix
    return net.layers[3](x).float() * angles.sin() + last


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("body", [half, whole])
def test_regions_of_autocast(body: Body, outside: bool) -> None:
    """In float32, which autocast casts. Truth is eager over the same chunks: rounding to bfloat16
    would show what a product of eight rows does differently from one of three."""
    model = Net(body).float()
    twin, x = copy.deepcopy(model), sample().detach().float()
    pipe = pipelined(model, devices=STAGES)

    def run(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
            return module(x)

    found = run(pipe, x)
    expected = torch.cat([run(twin, chunk) for chunk in x.tensor_split(3)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    objective(found).backward()
    objective(expected).backward()
    gradients = [q.grad for q in twin.parameters() if q.grad is not None]
    scale = max(g.abs().max().item() for g in gradients)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-6 * scale, name
    dtypes = {b.dtype for b, _ in crossing(pipe)}
    assert (torch.bfloat16 if body is half else torch.float32) in dtypes
