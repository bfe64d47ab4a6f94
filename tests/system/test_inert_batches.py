"""What only data can decide is not decided by a first batch in which nothing happens.

Each model meets a batch that is inert (no image token, equal ids, masks that are empty or full,
lengths that are full) and then active ones, or the other way round. Models that mix samples are
refused either way; the others train with eager torch's numbers. Covers batch/shares.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autopipe.errors import CouplingError, StageError
from tests.support.agreement import assert_agrees, pipelined

pytestmark = [pytest.mark.few(4), pytest.mark.usefixtures("traces_once")]

LENGTH, WIDTH, VOCABULARY, IMAGE = 5, 4, 12, 9
"""Of a batch of tokens; `IMAGE` is the token that stands for a patch of an image."""

Batch = tuple[Tensor, Tensor, Tensor]


class Model(nn.Module):
    """``f(model, hidden, ids, mask, lengths)`` between an embedding and a linear layer."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = f
        self.table, self.last = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.places = nn.Embedding(400, WIDTH)
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        self.router, self.experts = nn.Linear(WIDTH, 3), nn.Parameter(torch.randn(3, WIDTH))
        self.gate = nn.Parameter(torch.zeros(()))
        self.token = nn.Parameter(torch.randn(WIDTH))
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)
        self.register_buffer("enabled", torch.tensor(False))
        self.register_buffer("steps", torch.tensor(0))
        self.double()

    def forward(self, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        y: Tensor = self.last(self.f(self, self.table(ids), ids, mask, lengths).tanh())
        return y


def inert(size: int = 7) -> Batch:
    """No image, nothing masked, full lengths, and all samples equal."""
    ids = torch.full((size, LENGTH), 4)
    return ids, torch.zeros(size, LENGTH, dtype=torch.bool), torch.full((size,), LENGTH)


def active(size: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(size)
    ids = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)
    mask = torch.rand(size, LENGTH, generator=generator) < 0.4
    return ids, mask, torch.randint(1, LENGTH + 1, (size,), generator=generator)


# ---------------------------------------------------------------------------- samples stay apart


def order_of(ids: Tensor) -> Tensor:
    return ids.flatten().argsort(stable=True)


def offsets(ids: Tensor) -> Tensor:
    """The place of each sample's first token among all."""
    return torch.arange(ids.shape[0])[:, None] * LENGTH


def sorted_and_back(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    order = order_of(ids)
    return (x.flatten(0, 1)[order].sin())[order.argsort()].view_as(x)


def adapter_put_back(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    """An adapter whose second matrix is zero at first works on tokens sorted by id."""
    order = order_of(ids)
    change: Tensor = m.b(m.a(x.flatten(0, 1)[order]))
    return x + change[order.argsort()].view_as(x)


def experts(m: Model, x: Tensor, *_: Tensor) -> Tensor:
    """All tokens go to the first expert, as long as the router is zero."""
    flat = x.flatten(0, 1)
    best = m.router(flat).argmax(-1)
    order = best.argsort(stable=True)
    grouped = flat[order] * m.experts[best[order]]
    return torch.zeros_like(flat).index_copy(0, order, grouped).view_as(x)


def counted_in_sample(m: Model, x: Tensor, ids: Tensor, mask: Tensor, _: Tensor) -> Tensor:
    """Tokens under the mask come first, each sample for itself."""
    places = (~mask).long().argsort(dim=1, stable=True) + offsets(ids)
    return x.flatten(0, 1)[places.flatten()].view_as(x)


def capacity_of_a_sample(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    kinds = nn.functional.one_hot(ids % 3, 3)
    return x * ((kinds.cumsum(1) * kinds).sum(-1) <= 3)[..., None]


def last_of_each(m: Model, x: Tensor, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    return x + x.flatten(0, 1)[(lengths - 1) + offsets(ids)[:, 0]][:, None]


def guarded(m: Model, x: Tensor, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """A comparison that is never true keeps an index within its sample."""
    place = lengths - 1
    place = torch.where(place < 0, place + LENGTH, place)
    place = torch.where(place >= LENGTH, 0, place)
    return x * x.flatten(0, 1)[place + offsets(ids)[:, 0]][:, None]


def one_learned_token(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    """Every entry of the source is the same token: it does not matter which one is taken."""
    chosen = (ids == IMAGE)[..., None].expand_as(x)
    return x.masked_scatter(chosen, m.token.expand(200, WIDTH))


def attends_sorted(m: Model, x: Tensor, ids: Tensor, mask: Tensor, _: Tensor) -> Tensor:
    order = ids[:, 0].argsort(stable=True)
    y, seen = x[order], ~mask[order][:, None]
    y = nn.functional.scaled_dot_product_attention(y, y, y, seen | torch.eye(LENGTH).bool())
    return y[order.argsort()]


def scattered_in_sample(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    places = (ids.argsort(dim=1, stable=True) + offsets(ids)).flatten()
    return torch.zeros_like(x.flatten(0, 1)).index_copy(0, places, x.flatten(0, 1)).view_as(x)


APART = {
    f.__name__: f
    for f in (
        sorted_and_back,
        adapter_put_back,
        experts,
        counted_in_sample,
        capacity_of_a_sample,
        last_of_each,
        guarded,
        one_learned_token,
        attends_sorted,
        scattered_in_sample,
    )
}


@pytest.mark.parametrize("first", ["inert", "active"])
@pytest.mark.parametrize("name", APART)
def test_samples_that_stay_apart_do_so_in_every_batch(name: str, first: str) -> None:
    pipe = pipelined(Model(APART[name]))
    batches = [inert(), active()] if first == "inert" else [active(), inert()]
    for batch in (*batches, active(4)):
        assert_agrees(pipe, *batch)
    with torch.no_grad():  # as after some steps of training
        for p in pipe.model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    assert_agrees(pipe, *active())


# -------------------------------------------------------------------------------- samples mix


def patches_of_the_batch(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    """Entries of a table that is not batched, one after the other."""
    return x.masked_scatter((ids == IMAGE)[..., None].expand_as(x), m.places.weight)


def sorted_by_id(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    """Equal ids are sorted already."""
    return x.flatten(0, 1)[order_of(ids)].view_as(x)


def adapter_of_sorted(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    change: Tensor = m.b(m.a(x.flatten(0, 1)[order_of(ids)]))
    return x + change.view_as(x)


def zero_gate(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    return x + m.gate.tanh() * x.flatten(0, 1)[order_of(ids)].view_as(x)


def packed_places(m: Model, x: Tensor, ids: Tensor, mask: Tensor, _: Tensor) -> Tensor:
    """Places among the masked tokens of the whole batch."""
    places: Tensor = m.places(mask.flatten().cumsum(0).view_as(ids))
    return x + places


def packed_lengths(m: Model, x: Tensor, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """The ends of sequences that are taken as packed: right as long as all lengths are full."""
    return x + x.flatten(0, 1)[lengths.cumsum(0) - 1][:, None]


def large_capacity(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    """An expert drops what comes after its 300th token."""
    kinds = nn.functional.one_hot(ids.flatten() % 3, 3)
    return x * ((kinds.cumsum(0) * kinds).sum(-1) <= 300).view(*ids.shape, 1)


def high_scores(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    """No token scores as high at first."""
    y = x.flatten(0, 1)[order_of(ids)].view_as(x)
    return torch.where(x.sum(-1, keepdim=True) > 15, y, x)


def switched_on_later(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    return torch.where(m.enabled, x.flatten(0, 1)[order_of(ids)].view_as(x), x)


def after_a_warm_up(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    return torch.where(m.steps < 100, x, x.flatten(0, 1)[order_of(ids)].view_as(x))


def below_the_largest(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    return x * (ids.max() - ids + 1)[..., None]


def ranked(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    ranks = torch.searchsorted(ids.flatten().sort().values, ids.flatten())
    places: Tensor = m.places(ranks.view_as(ids))
    return x + places


def ids_of_the_next(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    following: Tensor = m.table(ids.roll(1, 0))
    return x + following


def products_of_counts(m: Model, x: Tensor, ids: Tensor, mask: Tensor, _: Tensor) -> Tensor:
    return x * (mask.flatten().long() + 1).cumprod(0).view_as(ids)[..., None]


def most_so_far(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    return x * ids.flatten().cummax(0).values.view_as(ids)[..., None]


def over_capacity(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    """Nothing is over it in a small batch."""
    kinds = nn.functional.one_hot(ids.flatten() % 3, 3)
    place = (kinds.cumsum(0) * kinds).sum(-1)
    return x + (place.double() - 300).relu().view(*ids.shape, 1)


def elsewhere(m: Model, x: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    """Whether the next id occurs anywhere in the batch."""
    return torch.where(torch.isin(ids + 1, ids)[..., None], x, x.sin())


def rank_by_length(m: Model, x: Tensor, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """The longest sample is scaled most: ranks are scattered to places that are computed."""
    order = lengths.argsort(stable=True)
    ranks = torch.zeros_like(lengths).scatter(0, order, torch.arange(lengths.shape[0]))
    return x * (ranks + 1)[:, None, None]


def shared_by_length(m: Model, x: Tensor, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """Samples of one length share a sum."""
    sums = torch.zeros(LENGTH, WIDTH, dtype=x.dtype).index_add(0, lengths - 1, x[:, 0])
    return x + sums[lengths - 1][:, None]


MIX = {
    f.__name__: f
    for f in (
        patches_of_the_batch,
        sorted_by_id,
        adapter_of_sorted,
        zero_gate,
        packed_places,
        packed_lengths,
        large_capacity,
        high_scores,
        switched_on_later,
        after_a_warm_up,
        below_the_largest,
        ranked,
        ids_of_the_next,
        products_of_counts,
        most_so_far,
        over_capacity,
        elsewhere,
        rank_by_length,
        shared_by_length,
    )
}


def mixes(model: Model) -> bool:
    """Eager torch: does a batch of some kind give other results in slices, once all is trained?"""
    changed = Model(model.f)
    with torch.no_grad():
        for p in changed.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 10)
        changed.enabled.fill_(True)
        changed.steps.fill_(100)
        for size in (7, 300):
            given = active(size)
            whole = changed(*given)
            parts = [changed(*p) for p in zip(*(g.split(2) for g in given), strict=True)]
            if not torch.allclose(whole, torch.cat(parts)):
                return True
    return False


def one_sample() -> Batch:
    return inert(1)


@pytest.mark.parametrize("first", [inert, active, one_sample])
@pytest.mark.parametrize("name", MIX)
def test_samples_that_mix_in_some_batch_are_refused(name: str, first: Callable[[], Batch]) -> None:
    model = Model(MIX[name])
    assert mixes(model)
    with pytest.raises(CouplingError) as caught:
        pipelined(model)(*first())
    assert str(caught.value.source).startswith(__file__)


@pytest.mark.parametrize("name", APART)
def test_the_truth_is_what_the_names_say(name: str) -> None:
    assert not mixes(Model(APART[name]))


# ------------------------------------------------------------------- entries of a batched source


class Images(nn.Module):
    """Text and the patches of one image per sample."""

    def __init__(self, loss: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.table = nn.Linear(3, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.last, self.loss = nn.Linear(WIDTH, VOCABULARY), loss
        self.double()

    def forward(self, ids: Tensor, patches: Tensor) -> Tensor:
        h = self.table(ids)
        h = h.masked_scatter((ids == IMAGE)[..., None].expand_as(h), self.patch(patches))
        y: Tensor = self.last(h.tanh())
        if self.loss:
            return nn.functional.cross_entropy(y.flatten(0, 1), ids.flatten())
        return y


def text_and_patches() -> tuple[Tensor, Tensor, Tensor]:
    """Text; the same with two image tokens per sample; two patches per sample."""
    text = torch.arange(7 * LENGTH).view(7, LENGTH) % IMAGE
    images = text.clone()
    images[:, 1:3] = IMAGE
    return text, images, torch.randn(7, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize("first", ["text", "images"])
@pytest.mark.parametrize("loss", [True, False])
def test_an_image_per_sample(loss: bool, first: str) -> None:
    text, images, patches = text_and_patches()
    pipe = pipelined(Images(loss))
    for ids in (text, images) if first == "text" else (images, text):
        assert_agrees(pipe, ids, patches)


@pytest.mark.parametrize("loss", [True, False])
def test_a_later_batch_in_which_samples_take_the_patches_of_others(loss: bool) -> None:
    """The first sample has no image token: the second takes its patches."""
    text, images, patches = text_and_patches()
    pipe = pipelined(Images(loss))
    assert_agrees(pipe, images, patches)
    images[0] = text[0]
    with pytest.raises(CouplingError, match="belong to other samples") as caught:
        pipe(images, patches)
    assert str(caught.value.source).startswith(__file__)
    assert caught.value.node == "masked_scatter"


def test_a_micro_batch_that_has_too_few_patches() -> None:
    """It fails before the sums of all micro-batches are checked; the next call works."""
    _, images, patches = text_and_patches()
    pipe = pipelined(Images(True))
    assert_agrees(pipe, images, patches)
    odd = images.clone()
    odd[0, 3], odd[3, 1] = IMAGE, 0
    with pytest.raises((StageError, CouplingError)) as caught:
        pipe(odd, patches)
    assert str(caught.value.source).startswith(__file__)
    assert_agrees(pipe, images, patches)


def test_a_first_batch_in_which_samples_take_the_patches_of_others() -> None:
    text, images, patches = text_and_patches()
    images[0] = text[0]
    with pytest.raises(CouplingError, match="entries of the source"):
        pipelined(Images(True))(images, patches)
