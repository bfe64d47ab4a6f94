"""Draw other values for the inputs, parameters and buffers of a trial.

What only data can decide must not be decided by a batch that happens to be inert: without an image
token, with masks that are all ones, with samples that are copies of each other, or with parameters
that are zero at initialisation. So a trial also runs the graph on values that this file draws:

    booleans                 permuted within each sample, or drawn with several probabilities
    integers                 permuted within each sample, or drawn from the values seen, constants
                             that they are compared with, and the rows of the tables they index
    floats                   as given, unless few values occur, samples are equal, or some are NaN
    parameters and buffers   as given, unless all entries are equal or tiny
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from autopipe.passes.graph import is_integer
from autopipe.passes.ir import B, InputKind

from .comparisons import compared_with, distinct
from .index_ranges import indexed_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autopipe.passes.ir import Input

FEW, MANY = 3, 4096
"""A float input with so few values is a mask; of so many values of an integer input are drawn."""

TINY = 1e-3
"""A parameter whose entries are all smaller may hide what it multiplies."""

USES = 500
"""The largest number of uses of an integer input that are looked at."""

MOVED = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        *("view", "reshape", "flatten", "expand", "expand_as", "unsqueeze", "squeeze", "slice"),
        *("select", "permute", "transpose", "clone", "contiguous", "detach", "alias", "to"),
        "_to_copy",
    )
)
"""Operators whose results are values of their operand, in other places."""


@dataclass(frozen=True)
class DrawnInputs:
    """Values for the placeholders of one run of a trial.

    Attributes:
        seed: of the random numbers.
        permute: whether integers and booleans of the samples are permuted within each sample where
            that changes them, so that each sample keeps its values; else they are drawn.
        limit: whether each sample's integers are drawn from a range of its own: so the smallest and
            the largest ones differ between samples.
        repeat: whether most samples repeat their first token: so the largest of what is computed
            from a token differs between samples, too.
        all_inputs: whether integers and booleans that are not batched are drawn too.
    """

    seed: int
    permute: bool = False
    limit: bool = False
    repeat: bool = False
    all_inputs: bool = False

    def value(self, node: fx.Node, item: Input, given: Tensor) -> Tensor:
        """A value for a placeholder.

        Args:
            node: the placeholder.
            item: what it stands for.
            given: its value in the batch at hand, on the samples of the trial. It is not changed.
        """
        dense = type(given) is Tensor and given.layout is torch.strided
        if (
            not dense
            or not given.numel()
            or (given.element_size() < 2 and given.is_floating_point())
        ):
            return given  # quantized or sparse
        drawn = self._drawn(node, item, given)
        if not self.repeat or item.kind is not InputKind.INPUT or item.batch_dim is None:
            return drawn
        return _with_repetitions(drawn, item.batch_dim, torch.Generator().manual_seed(self.seed))

    def _drawn(self, node: fx.Node, item: Input, given: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1009 + hash_of(item.name))
        if given.is_complex():
            return given
        if item.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            return self._weights(node, item, given, generator)
        if item.kind is not InputKind.INPUT:
            return given
        if given.is_floating_point():
            if item.batch_dim is None:
                return self._weights(node, item, given, generator)
            return _floats(item, given, generator)
        if item.batch_dim is None and not self.all_inputs:
            return given
        if self.permute and item.batch_dim is not None:
            moved = _permuted_within(given, item.batch_dim, generator)
            if not torch.equal(moved, given):
                return moved
        return self._choices(node, item, given, generator)

    def _choices(
        self, node: fx.Node, item: Input, given: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Integers or booleans, each sample with another mixture of rare and frequent ones."""
        shape = given.shape
        per_sample = [1] * given.dim()
        if item.batch_dim is not None:
            per_sample[item.batch_dim] = shape[item.batch_dim]
        odds = torch.rand(per_sample, generator=generator) * 0.8 + 0.1
        special_here = torch.rand(shape, generator=generator) < odds
        flag = given.numel() == 1 and item.batch_dim is None  # or a counter: at its extremes
        changed = self.permute or self.all_inputs
        if given.dtype is torch.bool:
            return ~given if flag and changed else special_here.to(given.device)
        own = given.numel() // (shape[item.batch_dim] if item.batch_dim is not None else 1)
        special, low, high = _range(node, given, own)
        if flag:
            return torch.full_like(given, int(special[-1 if changed else 0]))
        picked = special[torch.randint(len(special), shape, generator=generator)]
        ranged = torch.randint(low, high + 1, shape, generator=generator)
        drawn = torch.where(special_here, picked, ranged)
        if self.limit:
            ends = torch.rand([2, *per_sample], generator=generator).sort(0).values
            first, last = (low + (e * (high + 1 - low)).long() for e in ends)
            inside = (drawn >= first) & (drawn <= last)
            drawn = torch.where(inside, drawn, first + ranged % (last - first + 1))
        return drawn.to(given.device, given.dtype)

    def _weights(
        self, node: fx.Node, item: Input, given: Tensor, generator: torch.Generator
    ) -> Tensor:
        """A parameter, buffer or unbatched float: as given unless all entries are equal or tiny.

        A single number is as given unless it is 0 or 1: it may switch something off.
        """
        if not given.is_floating_point():
            constant = item.kind is InputKind.BUFFER and bool((given == given.flatten()[0]).all())
            return self._choices(node, item, given, generator) if constant else given
        size = _constant_size(given)
        if size is None or (given.numel() == 1 and size not in (0, 1)):
            return given
        draw = torch.rand(given.shape, generator=generator)
        if size < 0.1 and item.kind is InputKind.PARAMETER:
            return (draw - 0.5).to(given)
        scale = given.flatten()[0].item() if size >= 0.1 else 1.0
        return ((draw + 0.5) * scale).to(given)  # keeps its sign: it may be a variance


def hash_of(name: str) -> int:
    """A number for a name that is the same in every process."""
    return sum((i + 1) * ord(c) for i, c in enumerate(name)) % 997


def _range(node: fx.Node, given: Tensor, own: int) -> tuple[Tensor, int, int]:
    """Values of an integer input: special ones, and a range that is valid wherever it is used.

    If all are equal, they may be places among the sample's `own` entries. Negative numbers, such as
    the -100 of labels, are special values, not ends of a range.
    """
    seen = distinct(given.flatten()[:MANY]).cpu().long()
    least, most = int(seen.min()), int(seen.max())
    low, high = max(0, least), max(0, most)
    constants: set[int] = set()
    sizes: list[Any] = []
    for user, source, same in islice(_integer_uses(node), USES):
        constants |= compared_with(user, source)
        found = indexed_sizes(user, source)
        sizes += found if same else [B] * len(found)  # of an index that is computed: unknown
    fixed = [int(s) for s in sizes if not getattr(s, "free_symbols", ())]
    if len(seen) == 1:  # all lengths are full (none is 0), all positions equal
        low, high = min(1, low), max(1, most, min(own, *fixed, most + own) - 1)
    if fixed and len(fixed) == len(sizes):
        low, high = 0, max(min(fixed) - 1, 0)
    elif fixed:
        high = min(high, min(fixed) - 1)
    inside = {c for c in constants if not sizes or 0 <= c <= high or c in (least, most)}
    special = torch.tensor(sorted({*seen.tolist(), *inside}))
    if inside and given.numel() > 1:  # as frequent as all the values that were seen
        special = torch.cat([special, torch.tensor(sorted(inside)).repeat(1 + len(seen))])
    return special, min(low, high), high


def _integer_uses(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
    """(op, operand, whether the operand has the values of `node`) where its integers are read."""
    todo, known = [(node, True)], {node}
    while todo:
        source, same = todo.pop()
        for user in source.users:
            yield user, source, same
            if user not in known and is_integer(user):
                known.add(user)
                todo.append((user, same and getattr(user.target, "overloadpacket", None) in MOVED))


def _with_repetitions(given: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """The same, but most samples repeat their first entry along the next dimension."""
    chosen = torch.rand(given.shape[dim], generator=generator) < 0.85
    if given.dim() < 2:
        return given
    along = 1 if dim == 0 else 0
    first = given.narrow(along, 0, 1).expand(given.shape)
    shape = [1] * given.dim()
    shape[dim] = -1
    return torch.where(chosen.view(shape).to(given.device), first, given)


def _permuted_within(given: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """Each sample's entries in another order."""
    rows = given.movedim(dim, 0).flatten(1) if given.dim() > 1 else given[:, None]
    order = torch.rand(rows.shape, generator=generator).argsort(1).to(given.device)
    moved = rows.gather(1, order).view(given.movedim(dim, 0).shape)
    return moved.movedim(0, dim).contiguous()


def _floats(item: Input, given: Tensor, generator: torch.Generator) -> Tensor:
    """A batched float input: the given one unless it may be inert."""
    dim = item.batch_dim or 0
    finite = given[given.isfinite()]
    values = distinct(given.flatten()[:MANY])
    noise = torch.randn(given.shape, generator=generator).to(given)
    if len(values) <= FEW and given.numel() > FEW:
        if len(values) > 1 or values[0] == 1:  # a mask
            values = (
                torch.cat([values, values.new_tensor([0.0, 1.0])]) if len(values) < 2 else values
            )
            order = torch.randint(len(values), given.shape, generator=generator)
            return values[order.to(given.device)]
        return noise if not values[0].isfinite() else values[0] * (values[0] != 0) + noise
    samples = given.movedim(dim, 0).flatten(1) if given.dim() > 1 else given[:, None]
    if finite.numel() < given.numel():
        return torch.where(given.isfinite(), given, noise)
    if len(samples) > 1 and _has_copies(samples):
        return given + noise * (finite.float().std().to(given) if len(finite) > 1 else 1)
    return given


def _has_copies(samples: Tensor) -> bool:
    """Whether two rows are equal."""
    rows = torch.unique(samples, dim=0)
    return len(rows) < len(samples)


def _constant_size(given: Tensor) -> float | None:
    """The largest size of a parameter whose entries are equal or tiny; None for other ones."""
    flat = given.flatten()
    for some in (flat[:16], flat):  # most parameters are known to vary after a few entries
        largest = some.abs().max().item()
        if not torch.isfinite(some).all() or (largest >= TINY and bool((some != some[0]).any())):
            return None
    return float(largest)
