"""Buffers that a forward writes, in every way: as eager torch does for whole batches.

Covers capture/norm_statistics.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopipe.errors import CouplingError, UnsupportedError
from tests.support.agreement import assert_agrees, assert_close, pipelined
from tests.support.holding import Holds, assert_steps_agree, batches, counts, every_remat, x

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("traces_once")]

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


@pytest.mark.full
@every_remat
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore:the model's forward sets")
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
    code = Holds.forward.__code__
    assert caught.value.source == f"{code.co_filename}:{code.co_firstlineno + 1}"
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
