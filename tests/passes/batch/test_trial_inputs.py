"""What a trial draws: in range, active, and without touching what is given.

Covers batch/trial_inputs.py, batch/comparisons.py, batch/index_ranges.py, batch/sample_run.py and
batch/shares.py; whole models are in `tests/system/test_inert_batches.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from autopipe.errors import CouplingError
from autopipe.passes.batch.comparisons import compared_with
from autopipe.passes.batch.index_ranges import check_indices, indexed_sizes
from autopipe.passes.batch.numeric_trial import DRAWN
from autopipe.passes.batch.sample_run import is_uniform
from autopipe.passes.batch.shares import check_shares, count_shares
from autopipe.passes.ir import Input
from tests.support.programs import captured_of

aten = torch.ops.aten


class Text(nn.Module):
    """Ids are looked up and compared with 19; lengths pick a token; a gate is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(20, 4), nn.Linear(4, 4)
        self.gate, self.norm = nn.Parameter(torch.zeros(4)), nn.LayerNorm(4)
        self.register_buffer("variance", torch.ones(4))
        self.register_buffer("on", torch.tensor(False))

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor,
        mask: Tensor,
        x: Tensor,
        labels: Tensor,
        strength: Tensor,
    ) -> Tensor:
        h = self.norm(self.layer(self.table(ids) + x)) * self.gate / self.variance * strength
        h = torch.where(self.on, h, h + 1).masked_fill(mask[..., None], 0.0)
        h = torch.where((ids == 19)[..., None], h.sin(), h)
        last = h[torch.arange(h.shape[0]), lengths - 1]
        y: Tensor = last * (labels != -100).sum(1, keepdim=True)
        return y


def given(size: int = 7) -> dict[str, Tensor]:
    """An inert batch."""
    return {
        "ids": torch.full((size, 6), 3),
        "lengths": torch.full((size,), 6),
        "mask": torch.zeros(size, 6, dtype=torch.bool),
        "x": torch.zeros(size, 6, 4),
        "labels": torch.tensor([-100, 2, 5, -100, 3, 3]).repeat(size, 1),
        "strength": torch.zeros(()),
    }


def captured(**batch: Tensor) -> tuple[fx.Graph, dict[str, tuple[fx.Node, Input]]]:
    """The graph, and by an input's or a parameter's name its placeholder and what it stands for."""
    found = captured_of(Text(), **batch)
    graph = found.graph_module.graph
    nodes = {n.name: n for n in graph.nodes}
    names = sorted(batch)  # inputs are numbered in the order of their names
    return graph, {i.target or names[i.index]: (nodes[i.name], i) for i in found.inputs}


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Tensor]]:
    """What is drawn for each input and parameter of an inert batch."""
    model, batch = Text(), given()
    values = dict(model.state_dict()) | batch
    before = {n: v.clone() for n, v in values.items()}
    _, places = captured(**batch)
    found = {n: [how.value(*at, values[n]) for how in DRAWN] for n, at in places.items()}
    assert all(torch.equal(before[n], values[n]) for n in values)
    return found


def test_ids_are_rows_of_the_table_and_what_they_are_compared_with(
    drawn: dict[str, list[Tensor]],
) -> None:
    for ids in drawn["ids"]:
        assert ids.min() >= 0
        assert ids.max() < 20
        assert len(ids.unique(dim=0)) > 3
    assert sum(bool((ids == 19).any()) for ids in drawn["ids"]) >= 2


def test_lengths_are_no_longer_than_the_text_and_not_zero(drawn: dict[str, list[Tensor]]) -> None:
    for lengths in drawn["lengths"]:
        assert lengths.min() >= 1
        assert lengths.max() <= 6
    assert any(len(lengths.unique()) > 2 for lengths in drawn["lengths"])


def test_masks_have_both_values(drawn: dict[str, list[Tensor]]) -> None:
    for mask in drawn["mask"]:
        assert mask.dtype is torch.bool
        assert 0 < mask.sum() < mask.numel()


def test_labels_are_those_seen_or_between_them(drawn: dict[str, list[Tensor]]) -> None:
    """-100 is no end of a range: -50 would be an error."""
    first, *others = drawn["labels"]
    assert torch.equal(first.sort(1).values, given()["labels"].sort(1).values)
    assert not torch.equal(first, given()["labels"])
    for labels in others:
        assert set(labels.flatten().tolist()) <= {-100, *range(6)}


def test_floats_and_parameters_that_are_inert_are_drawn(drawn: dict[str, list[Tensor]]) -> None:
    for x in drawn["x"]:
        assert len(x.flatten(1).unique(dim=0)) == len(x)
    for name in ("gate", "norm.weight", "norm.bias"):
        assert all(len(p.unique()) > 1 for p in drawn[name]), name
    assert all((v > 0).all() and len(v.unique()) > 1 for v in drawn["variance"])
    assert all(s != 0 for s in drawn["strength"])
    assert any(bool(on) for on in drawn["on"])


def test_what_is_active_is_as_given() -> None:
    batch = given() | {"x": torch.randn(7, 6, 4), "strength": torch.tensor(0.3)}
    model = Text()
    _, places = captured(**batch)
    for how in (DRAWN[0], DRAWN[2]):
        assert torch.equal(how.value(*places["x"], batch["x"]), batch["x"])
        assert torch.equal(how.value(*places["strength"], batch["strength"]), batch["strength"])
        weight = model.layer.weight
        assert how.value(*places["layer.weight"], weight) is weight


@pytest.mark.parametrize("kind", ["copies", "nan", "infinite", "ones", "additive mask"])
def test_floats_that_may_hide_something(kind: str) -> None:
    x = torch.randn(7, 6, 4)
    if kind == "copies":
        x[1:] = x[0]
    elif kind == "ones":
        x.fill_(1)
    elif kind == "additive mask":
        x = torch.zeros(7, 6, 4).masked_fill(torch.arange(4) > 2, -torch.inf)
    else:
        x[2] = torch.nan if kind == "nan" else torch.inf
    _, places = captured(**given() | {"x": x})
    for how in DRAWN:
        found = how.value(*places["x"], x)
        assert found.shape == x.shape
        assert not torch.equal(found, x)
        if kind == "additive mask":
            assert set(found.unique().tolist()) == {0.0, -torch.inf}
        elif kind == "copies":
            assert len(found.flatten(1).unique(dim=0)) == 7
        elif kind != "ones":
            assert found.isfinite().all()


# ------------------------------------------------------------------------------ graphs and indices


def test_uses_of_integers_are_found_in_the_graph() -> None:
    graph, places = captured(**given())
    ids = places["ids"][0]
    by_target: dict[Any, fx.Node] = {u.target: u for u in ids.users}
    assert indexed_sizes(by_target[aten.embedding.default], ids) == [20]
    assert compared_with(by_target[aten.eq.Scalar], ids) == {19}
    less = graph.call_function(aten.lt.Scalar, (ids, 7))
    assert compared_with(less, ids) == {6, 7, 8}
    assert compared_with(graph.call_function(aten.add.Tensor, (ids, 7)), ids) == set()


X, TABLE = torch.randn(3, 4), torch.randn(5, 4)
CALLS: dict[str, Callable[[Tensor], tuple[Any, tuple[Any, ...]]]] = {
    "embedding": lambda i: (aten.embedding.default, (TABLE, i)),
    "gather": lambda i: (aten.gather.default, (X, 1, i[:, None])),
    "index_select": lambda i: (aten.index_select.default, (X, 0, i)),
    "index": lambda i: (aten.index.Tensor, (X, [None, i])),
    "index_put": lambda i: (aten.index_put.default, (X, [i, i], torch.zeros(()))),
    "scatter": lambda i: (aten.scatter.value, (X, 0, i[:, None], 1.0)),
    "scatter_add": lambda i: (aten.scatter_add.default, (X, 1, i[:, None], X)),
    "index_add": lambda i: (aten.index_add.default, (X, 0, i, X[: len(i)])),
    "one_hot": lambda i: (aten.one_hot.default, (i, 4)),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_index_is_checked_as_the_kernel_does(name: str) -> None:
    """The CPU's kernels raise an error for those indices for which the check does."""
    errors = 0
    for low in range(-6, 6):
        target, args = CALLS[name](torch.tensor([0, low, 1]))
        raised = []
        for run in (lambda t, a: t(*a), lambda t, a: check_indices(t, a, {})):
            try:
                run(target, args)
                raised.append(False)
            except (IndexError, RuntimeError):
                raised.append(True)
        negative = name in ("gather", "index_select", "scatter", "scatter_add", "index_add")
        if low >= 0 or not negative:  # those kernels have no negative indices: either may raise
            assert raised[0] == raised[1], low
        errors += raised[0]
    assert 0 < errors < 12


def test_uniform_values() -> None:
    assert is_uniform(torch.tensor([2.0, torch.nan, 2.0]))
    assert is_uniform(torch.full((3,), torch.nan))
    long = torch.zeros(200)
    assert is_uniform(long)
    long[150] = 1
    assert not is_uniform(long)


# ---------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 5, 1), (5, 1), (1,)])
def test_entries_are_counted_however_the_mask_is_expanded(shape: tuple[int, ...]) -> None:
    into, generator = torch.zeros(3, 5, 4), torch.Generator().manual_seed(0)
    for odds in (0.0, 0.5, 1.0):
        mask = torch.rand(shape, generator=generator) < odds
        taken = int(into.masked_fill(mask, 1.0).sum())
        for own in (taken, taken + 1):
            expected = [int(taken != own), int(taken != 0)]
            assert count_shares(into, mask, torch.zeros(own)).tolist() == expected
            assert count_shares(into, mask.expand(3, 5, 4), torch.zeros(own)).tolist() == expected


def test_samples_may_take_their_own_entries_or_none() -> None:
    for sums in ([0, 0], [0, 3], [3, 0]):
        assert check_shares(torch.tensor(sums), "scatter", "model.py:3").tolist() == sums
    with pytest.raises(CouplingError, match="belong to other samples") as caught:
        check_shares(torch.tensor([1, 2]), "scatter", "model.py:3")
    assert (caught.value.node, caught.value.source) == ("scatter", "model.py:3")
