"""What breaks pipelines of real models elsewhere, one difficulty each, with the cut where it hurts.

Truth is eager torch on the whole batch, in float64. Each test also looks at the stages, to see that
the difficult value truly crosses from one to another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import autopipe
from autopipe.errors import CouplingError
from autopipe.report.stages import Boundary

from .agreement import assert_agrees, assert_close, fresh, objective, pipelined
from .plans import plan_at

WIDTH, BATCH, STAGES, CHUNKS = 6, 7, 3, 3
REMATS = ("none", "full", "min-cut")
Body = Callable[..., Any]


class Net(nn.Module):
    """Four layers, a matrix, a buffer and a constant, used as `body` says."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.matrix = nn.Parameter(torch.rand(WIDTH, WIDTH))
        self.register_buffer("vector", torch.rand(WIDTH))
        self.body = body
        self.double()
        self.constant = torch.arange(1.0, WIDTH + 1, dtype=torch.float64)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return self.body(self, *args, **kwargs)

    def deep(self, x: Tensor, first: int = 0) -> Tensor:
        """Through the layers from `first` on."""
        for layer in self.layers[first:]:
            x = torch.tanh(layer(x))
        return x


def random(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def sample(seed: int = 1) -> Tensor:
    """Two of them have equal shapes, so that to swap them goes unnoticed."""
    return random(BATCH, WIDTH, seed=seed).requires_grad_()


def piped(
    body: Body, *args: Any, remat: str = "full", starts: Sequence[str] = (), **kwargs: Any
) -> autopipe.Pipeline:
    """Three stages, three uneven micro-batches; compared with eager.

    `starts`: the calls at which the last two stages start, if that matters.
    """
    plan = plan_at(starts, Net(body), CHUNKS, *args, remat=remat, **kwargs) if starts else None
    pipe = pipelined(Net(body), devices=STAGES, chunks=CHUNKS, remat=remat, plan=plan)
    assert_agrees(pipe, *args, **kwargs)
    return pipe


def crossing(pipe: autopipe.Pipeline) -> list[tuple[Boundary, Tensor]]:
    """What stages send one another, with a (fake) tensor that looks like it."""
    found = []
    for stage in pipe.stages:
        (output,) = [n for n in stage.graph_module.graph.nodes if n.op == "output"]
        nodes: tuple[fx.Node, ...] = output.args[0]
        found += [(b, n.meta["val"]) for b, n in zip(stage.outputs, nodes, strict=True)]
    return [(b, value) for b, value in found if b.targets]


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


# ------------------------------------------------------------------------------- odd tensors


def carried(make: Callable[[Tensor], Tensor], use: Callable[[Tensor, Tensor], Tensor]) -> Body:
    """`make` something of the first layer's value; `use` it behind the last layer."""

    def body(net: Net, x: Tensor) -> Tensor:
        odd = make(net.layers[0](x))
        return use(odd, net.deep(x, 1))

    return body


def back(odd: Tensor, x: Tensor) -> Tensor:
    return torch.fft.irfft(odd * odd, n=WIDTH) + x


ODD: dict[str, tuple[Body, Callable[[Tensor], bool]]] = {
    "transposed": (
        carried(lambda h: h.view(-1, 2, 3).mT, lambda odd, x: odd.mT.flatten(1) * x),
        lambda t: not t.is_contiguous(),
    ),
    "every other entry": (
        carried(lambda h: h[:, ::2], lambda odd, x: odd * x[:, 1::2]),
        lambda t: not t.is_contiguous(),
    ),
    "expanded": (
        carried(lambda h: h.sum(1, keepdim=True).expand(-1, WIDTH), lambda odd, x: odd * x),
        lambda t: 0 in t.stride(),
    ),
    "overlapping windows": (
        carried(lambda h: h.unfold(1, 3, 1), lambda odd, x: odd.sum(2) * x[:, :4]),
        lambda t: t.dim() == 3 and t.stride(1) == t.stride(2),
    ),
    "complex": (
        carried(torch.fft.rfft, back),
        lambda t: t.is_complex(),
    ),
    "complex conjugate": (
        carried(lambda h: torch.fft.rfft(h).conj(), back),
        lambda t: t.is_complex(),
    ),
    "an imaginary part": (
        carried(lambda h: torch.fft.rfft(h).conj().imag, lambda odd, x: odd * x[:, :4]),
        lambda t: not t.is_complex() and t.shape[1] == 4,
    ),
    "without elements": (
        carried(lambda h: h[:, :0].exp(), lambda odd, x: torch.cat([odd, x], 1)),
        lambda t: t.shape[1] == 0,
    ),
    "of truth values": (
        carried(lambda h: (h > 0).mT.contiguous().mT, lambda odd, x: torch.where(odd, x, -x)),
        lambda t: t.dtype is torch.bool,
    ),
}


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", ODD)
def test_odd_tensors_between_stages(name: str, remat: str) -> None:
    body, is_odd = ODD[name]
    pipe = piped(body, sample(), remat=remat, starts=("linear_2", "tanh_2"))
    odd = [b for b, value in crossing(pipe) if is_odd(value)]
    assert 2 in {k for b in odd for k in b.targets}, "it crosses, to the last stage"


def test_a_complex_input() -> None:
    x = torch.view_as_complex(random(BATCH, 3, 2)).requires_grad_()
    piped(lambda net, z: net.deep(torch.view_as_real(z).flatten(1)), x)


# ------------------------------------------------------------------------------- aliases


def aliased(body: Body, *, frozen: bool = False) -> Net:
    """The first weight is the third layer's as well and has a third name; a bias has two."""
    net = Net(body)
    net.layers[2].weight = net.layers[0].weight
    net.layers[1].bias = net.layers[0].bias
    net.alias = net.layers[0].weight
    net.alias.requires_grad_(not frozen)
    return net


ALIASES: dict[str, Body] = {
    "by its layers": lambda net, x: net.deep(x),
    "twice in one expression": lambda net, x: net.deep(x @ net.alias + net.layers[0](x)),
    "views of it": lambda net, x: net.deep(x * net.alias[0]) + net.layers[2].weight.t()[2],
    "it is a result too": lambda net, x: (net.deep(x), net.alias * 2, net.layers[2].weight),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("name", ALIASES)
def test_names_of_one_parameter(name: str, devices: int, frozen: bool) -> None:
    pipe = pipelined(aliased(ALIASES[name], frozen=frozen), devices=devices)
    assert_agrees(pipe, sample())
    lent = {b.name for s in pipe.stages for b in s.inputs if b.kind == "parameter"}
    assert bool(lent) == (devices > 1), "in one stage, or borrowed by others"
    names = [n for s in pipe.stages for n in s.parameters]
    assert len(set(names)) == len(names)
    used = [id(pipe.model.get_parameter(n)) for n in names]
    assert len(set(used)) == len(used), "one stage holds it, under one name"


# ------------------------------------------------------------------------------- masks


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=3,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=40,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).double().train()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3,
        n_embd=16,
        n_head=2,
        vocab_size=40,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).double().train()


def padded(lengths: list[int], side: str) -> dict[str, Tensor]:
    """Token numbers of sequences up to ten long, and which of them count."""
    places = torch.arange(10).expand(len(lengths), -1)
    ends = torch.tensor(lengths)[:, None]
    mask = (places < ends if side == "right" else places >= 10 - ends).long()
    ids = torch.randint(1, 40, mask.shape, generator=torch.Generator().manual_seed(len(lengths)))
    return {"input_ids": ids * mask, "attention_mask": mask}


def left(lengths: list[int]) -> dict[str, Tensor]:
    batch = padded(lengths, "left")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {**batch, "position_ids": positions}


def class_loss(result: Any, batch: dict[str, Tensor]) -> Tensor:
    labels = torch.arange(len(batch["input_ids"])) % 3
    return F.cross_entropy(result.logits, labels)


def token_loss(result: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of tokens whose predecessor counts. (transformers' own computes in float32.)"""
    counts = batch["attention_mask"][:, :-1] == 1
    return F.cross_entropy(result.logits[:, :-1][counts], batch["input_ids"][:, 1:][counts])


MASKED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], Callable[..., Tensor]]] = {
    "bert": (bert, lambda lengths: padded(lengths, "right"), class_loss),
    "gpt2, padded on the left": (gpt2, left, token_loss),
}
BATCHES = [[10, 3, 7, 1, 10, 5, 8], [10] * 7, [4, 9]]
"""Lengths of the sequences: with padding; with none, so that the mask says nothing; few."""


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", MASKED)
def test_attention_masks_with_padding(name: str, first: int) -> None:
    """Whichever batch the model was captured with: transformers leaves masks out that have nothing
    to hide, and a capture must not. (Biases of keys have no gradient but rounding, so the scale is
    that of the model's largest.)"""
    make, inputs, loss = MASKED[name]
    model = make()
    twin = copy.deepcopy(model)
    pipe = pipelined(model, devices=STAGES, kwargs=inputs(BATCHES[first]))
    for lengths in BATCHES:
        batch, losses = inputs(lengths), []
        for module in (pipe, twin):
            module.zero_grad()
            losses.append(loss(module(**batch), batch))
            losses[-1].backward()
        assert_close(*losses)
        scale = max(p.grad.abs().max().item() for p in twin.parameters() if p.grad is not None)
        for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), key
            assert q.grad is None or (p.grad - q.grad).abs().max() <= 1e-12 * scale, key
    batched = [b for b, value in crossing(pipe) if value.dim() == 4]
    assert {k for b in batched for k in b.targets} == {1, 2}, "the mask crosses to later stages"


@pytest.mark.parametrize("name", MASKED)
def test_what_stands_in_the_padding_is_nobodys_business(name: str) -> None:
    make, inputs, loss = MASKED[name]
    pipe, batch = pipelined(make(), devices=STAGES), inputs(BATCHES[0])
    other = fresh(batch)
    other["input_ids"][batch["attention_mask"] == 0] = 39
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    assert_close(loss(pipe(**other), other), loss(pipe(**batch), batch))


# ------------------------------------------------------------------------------- results


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
