"""Buffers that a forward writes, however it does: what eager torch makes of whole batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe.errors import CouplingError, UnsupportedError
from tests.agreement import assert_agrees, assert_close, objective, pipelined


def x(seed: int = 0, *shape: int) -> Tensor:
    """Seven samples that differ in size, for three micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(7, *(shape or (4,)), dtype=torch.float64, generator=generator)
    return drawn * torch.arange(1.0, 8).double().view(-1, *[1] * (drawn.dim() - 1))


class Holds(nn.Module):
    """``forward(self, x)`` is `f`, with a layer and buffers of several shapes at its disposal."""

    def __init__(self, f: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.register_buffer("n", torch.zeros((), dtype=torch.long))
        self.register_buffer("a", torch.rand(4))
        self.register_buffer("b", torch.rand(4))
        self.register_buffer("table", torch.rand(3, 4))
        self.register_buffer("queue", torch.rand(9, 4))
        self.register_buffer("cube", torch.rand(2, 2, 4))
        self.f = f
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x)


def assert_steps_agree(model: nn.Module, *batches: Tensor, **options: Any) -> autopipe.Pipeline:
    """Two steps of training with an evaluation between, as the model itself makes them."""
    twin, pipe = copy.deepcopy(model), pipelined(model, **{"devices": 1} | options)
    for train, batch in zip((True, False, True), batches, strict=True):
        for part in (pipe, twin):
            part.train(train)
        if train:  # compares with a copy of the model as it is now
            assert_agrees(pipe, batch.clone().requires_grad_())
            with torch.no_grad():
                twin(batch)
        else:
            with torch.no_grad():
                assert_close(pipe(batch), twin(batch))
        names = [n for n, _ in twin.named_buffers()]
        assert [n for n, _ in model.named_buffers()] == names
        for name in names:
            assert_close(model.get_buffer(name), twin.get_buffer(name), name)
    return pipe


def batches(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return x(0, *shape), x(1, *shape), x(2, *shape)


def deep(f: Any) -> nn.Module:
    """With enough before and after for two stages."""
    ends = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double() for _ in range(2)]
    return nn.Sequential(ends[0], Holds(f), ends[1])


every_remat = pytest.mark.parametrize("remat", ["full", "none", "min-cut"])


# ------------------------------------------------------------------------------- assigned


def counts(s: Any, x: Tensor) -> Tensor:
    s.n = s.n + 1
    return s.layer(x) * s.n


def averages(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    if s.training:
        with torch.no_grad():
            s.a = 0.9 * s.a + 0.1 * y.mean(0)
    return y


def averages_outside_of_no_grad(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    s.a = 0.9 * s.a + 0.1 * y.detach().mean(0)
    return y.sin()


def swaps(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x) * s.a
    s.a, s.b = s.b, s.a
    return y + s.b.sin()


def hands_on(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x) + s.a
    s.a, s.b = s.b + 1, s.a * 2
    return y


def twice(s: Any, x: Tensor) -> Tensor:
    s.a = s.a * 2
    y = s.layer(x) * s.a
    s.a = s.a + 1
    return y + s.a


def in_place_and_assigned(s: Any, x: Tensor) -> Tensor:
    s.a.add_(1)
    y = s.layer(x) * s.a
    s.a = s.a.clone()
    s.a.mul_(0.5)
    return y


def registers_again(s: Any, x: Tensor) -> Tensor:
    s.register_buffer("a", s.a + 1)
    return s.layer(x) * s.a


def returns_the_old(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    before = s.a
    s.a = s.a + 1
    return s.layer(x), before


ASSIGNING = [
    counts,
    averages,
    averages_outside_of_no_grad,
    swaps,
    hands_on,
    twice,
    in_place_and_assigned,
    registers_again,
]


@every_remat
@pytest.mark.parametrize("f", ASSIGNING)
def test_an_assigned_buffer_changes_once_a_step(f: Any, remat: str) -> None:
    assert_steps_agree(deep(f), *batches(), devices=2, remat=remat)


@pytest.mark.parametrize("f", ASSIGNING)
def test_in_one_micro_batch_too(f: Any) -> None:
    assert_steps_agree(Holds(f), *batches(), chunks=1)


def test_it_stays_the_same_object() -> None:
    model = Holds(counts)
    before = dict(model.named_buffers())
    pipelined(model)(x())
    assert all(model.get_buffer(name) is b for name, b in before.items())
    assert model.n == 1


def test_in_a_submodule() -> None:
    assert_steps_agree(nn.Sequential(Holds(counts), nn.Tanh(), Holds(averages)), *batches())


def test_the_value_before_may_be_returned() -> None:
    for chunks in (1, 3):
        assert_agrees(pipelined(Holds(returns_the_old), chunks=chunks, devices=1), x())


def test_without_deferral_each_micro_batch_assigns() -> None:
    model = Holds(averages)
    twin = copy.deepcopy(model)
    pipelined(model, devices=1, batch_norm="micro")(x())
    for chunk in x().tensor_split(3):
        twin(chunk)
    assert_close(model.a, twin.a)


def test_verify_compares_it_and_puts_it_back() -> None:
    model = Holds(averages)
    before = {n: (b, b.clone()) for n, b in model.named_buffers()}
    pipe = pipelined(model, args=(x(),))
    found = pipe.verify(x())
    assert found.ok
    assert all(model.get_buffer(n) is b for n, (b, _) in before.items())
    assert all(torch.equal(b, value) for b, value in before.values())
    changed = [d for d in found.differences if d.name == "a"]
    twin = copy.deepcopy(model)
    twin(x())
    assert changed[0].scale == twin.a.abs().max().item() != before["a"][1].abs().max().item()


def test_tied_buffers_that_are_assigned_together() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Holds(averages), Holds(averages)
            self.other.n = self.one.n

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x) * self.one.n
            self.one.n = self.other.n = self.one.n + 1
            return y + self.other(x) * self.other.n

    assert_steps_agree(Both(), *batches())


def unties(s: Any, x: Tensor) -> Tensor:
    s.a = s.b
    return s.layer(x) * s.a


def shows(s: Any, x: Tensor) -> Tensor:
    s.a = s.table[0]
    return s.layer(x) * s.a


@pytest.mark.parametrize("f", [unties, shows])
def test_buffers_that_become_one_are_refused(f: Any) -> None:
    """In eager torch the next write to one of them changes the other."""
    with pytest.raises(UnsupportedError, match="share memory") as caught:
        pipelined(Holds(f))(x())
    assert "a" in str(caught.value.found)
    assert "copy_" in str(caught.value.remedy)


# ------------------------------------------------------------------------------- out=


def power_iteration(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        torch.mv(s.layer.weight, s.b, out=s.a)
        torch.div(s.a, s.a.norm(), out=s.b)
    return s.layer(x) / s.a.dot(s.b)


def out_of_samples(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    with torch.no_grad():
        torch.mean(y, 0, out=s.a)
    return y


@every_remat
@pytest.mark.parametrize("f", [power_iteration, out_of_samples])
def test_what_is_written_by_out(f: Any, remat: str) -> None:
    assert_steps_agree(Holds(f), *batches(), remat=remat)


@every_remat
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore:the model's forward sets the attributes")
def test_spectral_norm(norm: Any, remat: str) -> None:
    """One power iteration a step: the weight is the same for all micro-batches."""
    torch.manual_seed(0)
    layers = [norm(nn.Linear(4, 6, dtype=torch.float64)), nn.Tanh()]
    layers += [norm(nn.Linear(6, 3, dtype=torch.float64), n_power_iterations=3)]
    assert_steps_agree(nn.Sequential(*layers), *batches(), remat=remat)


# ------------------------------------------------------------------------------- instance norm


@every_remat
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.InstanceNorm1d(4, track_running_stats=True), (4, 5)),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 3, 5)),
        (nn.InstanceNorm3d(4, momentum=0.7, track_running_stats=True), (4, 2, 3, 2)),
        (nn.InstanceNorm2d(4, momentum=None, track_running_stats=True), (4, 3, 5)),
    ],
)
def test_running_statistics_of_instances(layer: nn.Module, shape: Any, remat: str) -> None:
    model = nn.Sequential(nn.Tanh(), copy.deepcopy(layer).double(), nn.Sigmoid())
    assert_steps_agree(model, *batches(*shape), remat=remat)


def test_one_layer_of_instances_used_twice() -> None:
    layer = nn.InstanceNorm1d(4, track_running_stats=True).double()
    assert_steps_agree(nn.Sequential(layer, nn.Tanh(), layer), *batches(4, 5))


def test_statistics_that_are_rows_of_one_buffer() -> None:
    class Rows(Holds):
        def forward(self, x: Tensor) -> Tensor:
            mean, variance = self.table[0], self.table[1]
            y = F.instance_norm(x, mean, variance, use_input_stats=self.training)
            return self.layer(y.mean(2))

    assert_steps_agree(Rows(counts), *batches(4, 5))


@pytest.mark.parametrize("chunks", [1, 3])
def test_batch_statistics_that_are_rows_of_one_buffer(chunks: int) -> None:
    """Written by two calls, so that the second blends with what the first has made."""

    def f(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = s.table[1], s.table[2]
        first = F.batch_norm(x, mean, variance, training=True)
        return first, F.batch_norm(x.sin() + 5, mean, variance, training=True, momentum=0.3)

    model = Holds(f)
    twin = copy.deepcopy(model)
    pipe = pipelined(model, devices=1, chunks=chunks)
    for seed in range(2):
        pipe(x(seed))
        twin(x(seed))
        assert_close(model.table, twin.table)


# ------------------------------------------------------------------------------- views


def history(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x) + s.table[1]
    with torch.no_grad():
        s.table[1:] = s.table[:-1].clone()
        s.table[0] = y.mean(0)
    return y


def data(s: Any, x: Tensor) -> Tensor:
    s.n.data.add_(1)
    s.a.data.mul_(0.9)
    return s.layer(x) * s.n + s.a


def flat(s: Any, x: Tensor) -> Tensor:
    s.table.view(-1).mul_(0.5)
    s.cube.view(2, 8)[1].add_(s.n + 1)
    s.cube.flatten(1)[:, ::3].neg_()
    s.table.unsqueeze(0).squeeze(0).add_(1)
    return s.layer(x) * s.table.sum() + s.cube.sum((0, 1))


def turned(s: Any, x: Tensor) -> Tensor:
    s.table.t()[2].fill_(3)
    s.table.T[0].add_(1)
    s.cube.permute(2, 0, 1)[1, :, 0] *= 2
    s.cube.transpose(0, 2)[3, 1].copy_(s.a[:2])
    s.cube.movedim(0, -1)[0].sin_()
    s.cube.mT.narrow(1, 1, 2).add_(0.25)
    return s.layer(x) * s.table[0] + s.cube[0, 1]


def diagonal(s: Any, x: Tensor) -> Tensor:
    s.table.diagonal(1).mul_(2)
    s.table[:, :3].diagonal().add_(1)
    return s.layer(x) * s.table[0]


def read_through_older_views(s: Any, x: Tensor) -> Tensor:
    """Views see what is written later, by other names; copies do not."""
    row, column, copied = s.table[1], s.table[:, 2], s.table[1] * 1.0
    parts = s.table.chunk(2, 1)
    s.table.add_(1)
    row.mul_(2)
    column[0] = row[3]
    y = s.layer(x) * row.clone() + column.sum() + copied + parts[1].sum()
    s.table[1, 1] = 0.0
    return y + row


def broadcast(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x) + s.table[0]
    s.table[0] = y.detach().mean(0, keepdim=True)
    s.table[1:] = s.a
    s.table[1:, 1].zero_()
    s.cube[..., None][1, :, :, 0] = 2.0
    return y


def a_type_that_differs_is_a_copy(s: Any, x: Tensor) -> Tensor:
    same, other = s.a.to(torch.float64), s.a.to(torch.float32)
    s.a.add_(1)
    return s.layer(x) * same + other


def another_type_is_written(s: Any, x: Tensor) -> Tensor:
    """What is written takes the buffer's type, whatever was computed with."""
    s.n += x.shape[1]
    s.a.copy_(s.n)
    s.b[:2] = s.n
    return s.layer(x) * (s.n // 2) + s.b


def by_index(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x) + s.table.sum(0)
    s.table[s.n.view(1) % 3] = y.detach().sum(0)
    s.table[s.table > 1] = 0.5
    s.n += 1
    return y


VIEWING = [
    history,
    data,
    flat,
    turned,
    diagonal,
    broadcast,
    read_through_older_views,
    a_type_that_differs_is_a_copy,
    another_type_is_written,
    by_index,
]


@every_remat
@pytest.mark.parametrize("f", VIEWING)
def test_what_is_written_through_a_view(f: Any, remat: str) -> None:
    assert_steps_agree(Holds(f), *batches(), remat=remat)


def test_a_reduction_that_is_read_again_mixes_samples() -> None:
    def f(s: Any, x: Tensor) -> Tensor:
        y = s.layer(x)
        s.table[0] = y.detach().mean(0)
        return y + s.table[0]

    with pytest.raises(CouplingError):
        pipelined(Holds(f))(x())
    assert_steps_agree(Holds(f), *batches(), chunks=1)


def test_a_view_written_with_a_gradient() -> None:
    """The values read afterwards carry their gradient on."""

    def f(s: Any, x: Tensor) -> Tensor:
        s.table[0] = s.layer.weight.sum(0)
        y = s.layer(x) * s.table[0].clone()
        with torch.no_grad():
            s.table[1] = 1.0
        return y

    assert_agrees(pipelined(Holds(f)), x())


def test_what_is_drawn_into_a_buffer() -> None:
    def f(s: Any, x: Tensor) -> Tensor:
        return s.layer(x) + s.a.normal_() + s.table[0].uniform_()

    model = Holds(f)
    before = model.a.clone(), model.table.clone()
    pipelined(model, devices=1)(x()).sum().backward()
    assert not (model.a == before[0]).any()
    assert ((model.table == before[1]).sum(1) == torch.tensor([0, 4, 4])).all()


# ------------------------------------------------------------------------------- refused


def as_another_type(s: Any, x: Tensor) -> Tensor:
    s.a.view(torch.int64).bitwise_and_(-2)
    return s.layer(x) * s.a


def several(s: Any, x: Tensor) -> Tensor:
    torch._foreach_mul_([s.a, s.b], 0.5)
    return s.layer(x) * s.a


def parts(s: Any, x: Tensor) -> Tensor:
    s.table.chunk(2, 1)[0].mul_(2)
    return s.layer(x) * s.table[0]


@pytest.mark.parametrize(
    ("f", "name"),
    [(as_another_type, "a"), (several, "a, b"), (parts, "table")],
)
def test_what_cannot_be_deferred_is_refused(f: Any, name: str) -> None:
    model = nn.Sequential(nn.Tanh(), Holds(f))
    with pytest.raises(UnsupportedError, match="once a step") as caught:
        pipelined(model)(x())
    error = caught.value
    assert ", ".join(f"1.{n}" for n in name.split(", ")) in str(error.found)
    assert error.node is not None
    code = Holds.forward.__code__
    assert error.source == f"{code.co_filename}:{code.co_firstlineno + 1}"
    assert 'batch_norm="micro"' in str(error.remedy)
    twin = copy.deepcopy(model)
    found = pipelined(model, devices=1, batch_norm="micro")(x())
    assert_close(found, torch.cat([twin(chunk) for chunk in x().tensor_split(3)]))


@pytest.mark.parametrize("batch_norm", ["deferred", "micro"])
def test_samples_written_to_rows_are_refused(batch_norm: str) -> None:
    def banks(s: Any, x: Tensor) -> Tensor:
        s.queue[: x.shape[0]] = x.detach()
        return s.layer(x)

    with pytest.raises(UnsupportedError, match="sample by sample") as caught:
        pipelined(Holds(banks), devices=1, batch_norm=batch_norm)(x())
    assert "queue" in str(caught.value.found)
    assert str(caught.value.source).startswith(banks.__code__.co_filename)
    assert_steps_agree(Holds(banks), *batches(), chunks=1)


def test_a_buffer_that_shows_another_is_refused() -> None:
    """Of those that a forward uses: they are two placeholders of the graph, in eager one memory."""

    def f(s: Any, x: Tensor) -> Tensor:
        s.table.add_(1)
        return s.layer(x) * s.a

    model = Holds(f)
    model.a = model.table[0]
    with pytest.raises(UnsupportedError, match="once a step"):
        pipelined(model)(x())


def test_nothing_is_refused_in_one_micro_batch() -> None:
    for f in (as_another_type, several, parts):
        assert_steps_agree(Holds(f), *batches(), chunks=1)


@pytest.mark.parametrize("f", ASSIGNING)
@pytest.mark.parametrize("remat", ["full", "none"])
def test_in_micro_batches_what_was_read_is_kept_for_the_backward(f: Any, remat: str) -> None:
    model = Holds(f)
    twin = copy.deepcopy(model)
    pipe = pipelined(model, devices=1, batch_norm="micro", remat=remat)
    objective(pipe(x())).backward()
    objective(torch.cat([twin(chunk) for chunk in x().tensor_split(3)])).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad, name)
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert_close(b, c, name)
