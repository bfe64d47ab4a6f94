"""Torch's own operators, one by one, as models of a single call: the material of `test_operators`.

Operators and their arguments come from torch's operator database. Each of them, with one dimension
of its first tensor (and of others that have it) for the batch, is captured; what is accepted
must compute in micro-batches what eager torch computes on the whole batch, and what is refused is
asked of an oracle that knows nothing of autopipe: the operator itself, on the whole and in parts.
"""

from __future__ import annotations

import copy
import enum
import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.testing._internal import common_methods_invocations as database
from torch.utils import _pytree as pytree

import autopipe
from autopipe.errors import AutopipeError, CouplingError, StageError
from tests.support.agreement import objective

UNSAFE = {
    "lu_unpack": "its pivots are not checked",
    "native_batch_norm": "the sizes of its weights are not checked",
    "_native_batch_norm_legit": "the sizes of its weights are not checked",
    "_batch_norm_with_update": "the sizes of its weights are not checked",
}
"""Operators that corrupt memory when they are given a part of something."""
OPERATORS = {op.full_name: op for op in database.op_db if op.name not in UNSAFE}
SAMPLES = 5
"""Fewer than that in a dimension are made so many."""
CUT = 2
"""Samples in the oracle's first part."""
DTYPES = (torch.float64, torch.float32, torch.int64, torch.bool)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the largest entry of what is compared."""


class Verdict(enum.Enum):
    """What became of a case."""

    EQUAL = "accepted, and equal to eager"
    WRONG = "accepted, and not equal to eager"
    COUPLED = "refused, and it does mix samples"
    APART = "refused, although it keeps samples apart"
    NO_GRAPH = "refused by another error, although it keeps samples apart"
    RANDOM = "random, so that nothing can be compared"
    CRASH = "an error that is not autopipe's"


@dataclass(frozen=True)
class Case:
    """One call, of which dimension `dims[n]` of tensor n is the batch's (None: it has none).

    Attributes:
        operator: its name in torch's database.
        sample: which of the operator's sample inputs.
        dims: for every tensor among the arguments.
        copied: the operator works on copies of what the model is given, not on views of the batch.
    """

    operator: str
    sample: int
    dims: tuple[int | None, ...]
    copied: bool


@dataclass(frozen=True)
class Outcome:
    """The verdict of a case, and what led to it."""

    case: Case
    verdict: Verdict
    reason: str = ""
    call: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.case}: {self.verdict.value}: {self.reason}\n    {self.call}"


class Applied(nn.Module):
    """An operator on its batched tensors, or copies of them; the others are held by the model.

    Complex results are returned as pairs of reals, what is no tensor not at all.
    """

    def __init__(self, case: Case, structure: pytree.TreeSpec, leaves: Sequence[Any]) -> None:
        super().__init__()
        self.operator = OPERATORS[case.operator]
        self.structure, self.copied = structure, case.copied
        self.leaves: list[Any] = [None if isinstance(x, Tensor) else x for x in leaves]
        self.batched: list[int] = []
        self.held: list[int] = []
        dims = iter(case.dims)
        for n, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            if next(dims) is not None:
                self.batched.append(n)
                continue
            self.held.append(n)
            if leaf.requires_grad:
                self.register_parameter(f"held{n}", nn.Parameter(leaf.detach().clone()))
            else:
                self.register_buffer(f"held{n}", leaf.detach().clone())

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.leaves)
        for n, x in zip(self.batched, given, strict=True):
            leaves[n] = x.clone() if self.copied else x
        for n in self.held:
            leaves[n] = getattr(self, f"held{n}")
        first, args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        result = pytree.tree_leaves(self.operator(first, *args, **kwargs))
        tensors = [x for x in result if isinstance(x, Tensor) and x.layout is torch.strided]
        return tuple(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in tensors)


@functools.lru_cache(maxsize=1)
def samples_of(name: str) -> list[tuple[list[Any], pytree.TreeSpec]]:
    """The operator's sample inputs, as leaves; always the same ones."""
    op = OPERATORS[name]
    dtype = next((d for d in DTYPES if op.supports_dtype(d, "cpu")), None)
    if dtype is None:
        return []
    torch.manual_seed(0)
    random.seed(0)
    grad = op.supports_autograd and dtype.is_floating_point
    found = op.sample_inputs("cpu", dtype, requires_grad=grad)
    return [pytree.tree_flatten((s.input, s.args, s.kwargs)) for s in found]


def cases_of(name: str, most: int | None = None, per_sample: int | None = None) -> list[Case]:
    """Cases of an operator: of at most so many sample inputs, and so many of each.

    Which ones is drawn, and always the same.
    """
    draw = random.Random(name)
    samples = list(enumerate(samples_of(name)))
    if most is not None:
        draw.shuffle(samples)
    cases: list[Case] = []
    used = 0
    for n, (leaves, _) in samples:
        found = [Case(name, n, dims, draw.random() < 0.5) for dims in _choices(leaves)]
        if per_sample is not None:
            found = draw.sample(found, min(per_sample, len(found)))
        cases += found
        used += bool(found)
        if used == most:
            break
    return cases


def _choices(leaves: Sequence[Any]) -> Iterator[tuple[int | None, ...]]:
    """Every dimension of the first tensor; alone, with those that have it in the same place, and
    with those that have it in the same place counted from the last dimension."""
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if not tensors or any(x.layout is not torch.strided or not x.numel() for x in tensors):
        return  # of tensors without entries nothing is seen
    first = tensors[0]
    for d in range(first.dim()):
        size = first.shape[d]
        if size < 2:
            continue
        choices: list[tuple[int | None, ...]] = [(d, *[None] * (len(tensors) - 1))]
        choices.append(tuple(d if _has(x, d, size) else None for x in tensors))
        back = [x.dim() - first.dim() + d for x in tensors]
        choices.append(
            tuple(e if _has(x, e, size) else None for x, e in zip(tensors, back, strict=True))
        )
        yield from dict.fromkeys(choices)


def _has(x: Tensor, dim: int, size: int) -> bool:
    return 0 <= dim < x.dim() and x.shape[dim] == size


def _enough(x: Tensor, dim: int) -> Tensor:
    """At least `SAMPLES` samples, floating ones all different."""
    size = x.shape[dim]
    parts = [
        x.detach() * (1 - 0.07 * turn) if x.is_floating_point() else x
        for turn in range(-(-SAMPLES // size))
    ]
    if len(parts) == 1:
        return x.detach().clone().requires_grad_(x.requires_grad)
    more = torch.cat(parts, dim).narrow(dim, 0, SAMPLES).clone()
    return more.requires_grad_(x.requires_grad)


def judge(case: Case, chunks: Sequence[int] = (2, 3)) -> Outcome | None:
    """Compile a case and compare; None where eager torch itself cannot do it."""
    with mock.patch.object(database, "wrapper_set_seed", _unseeded):
        return _judge(case, chunks)


def _unseeded(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """The database seeds some random operators anew in each call, so that they pass for exact."""
    return operator(*args, **kwargs)


def _judge(case: Case, chunks: Sequence[int]) -> Outcome | None:
    leaves, structure = samples_of(case.operator)[case.sample]
    model = Applied(case, structure, leaves)
    dims = [d for d in case.dims if d is not None]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    given = [_enough(x, d) for x, d in zip(tensors, case.dims, strict=True) if d is not None]
    call = _described(model, given)
    try:
        whole, same = (_seeded(model, given, seed) for seed in (0, 1))
    except Exception:
        return None  # with other sizes than the sample's, or a size that another argument states
    if not whole:
        return None
    varies = any(not _close(a, b) for a, b in zip(whole, same, strict=True))

    def outcome(verdict: Verdict, reason: str = "") -> Outcome:
        return Outcome(case, Verdict.RANDOM if varies else verdict, reason, call)

    expected = _step(model, given)
    for n in chunks:
        try:
            pipe = autopipe.compile(model, devices=1, chunks=n, in_dims=tuple(dims))
            found = _step(pipe, given, backward=expected.gradients is not None)
        except Exception as error:
            typed = isinstance(error, AutopipeError) and not isinstance(error, StageError)
            reason = f"{type(error).__name__} in {n} chunks: {_short(error)}"
            if not typed and _runs_in_parts(model, given, dims, n):
                return Outcome(case, Verdict.CRASH, reason, call)
            if not keeps_apart(model, given, dims, whole):
                return outcome(Verdict.COUPLED, reason)
            coupling = isinstance(error, CouplingError)
            return outcome(Verdict.APART if coupling else Verdict.NO_GRAPH, reason)
        different = _difference(found, expected)
        if different and not varies:
            return outcome(Verdict.WRONG, f"{different} in {n} chunks")
    return outcome(Verdict.EQUAL)


# ------------------------------------------------------------------------------------- the oracle


def keeps_apart(
    model: nn.Module, given: Sequence[Tensor], dims: Sequence[int], whole: Sequence[Tensor]
) -> bool:
    """Whether every result on the whole follows from those on two parts, cut in two ways: they are
    put together along a dimension, or added, or averaged by the number of samples."""
    size = given[0].shape[dims[0]]
    for cut in (CUT, size - CUT):
        try:
            parts = [
                _seeded(model, [x.narrow(d, a, n) for x, d in zip(given, dims, strict=True)], 0)
                for a, n in ((0, cut), (cut, size - cut))
            ]
        except Exception:
            return False
        for expected, one, two in zip(whole, *parts, strict=True):
            if not any(_close(x, expected) for x in _combinations(one, two, cut / size)):
                return False
    return True


def _combinations(one: Tensor, two: Tensor, share: float) -> Iterator[Tensor]:
    if one.dim() == two.dim():
        for d in range(one.dim()):
            if one.shape[:d] + one.shape[d + 1 :] == two.shape[:d] + two.shape[d + 1 :]:
                yield torch.cat([one, two], d)
    if one.shape == two.shape and one.dtype not in (torch.bool, torch.uint64):
        yield one + two
        if one.is_floating_point():
            yield one * share + two * (1 - share)


def _runs_in_parts(
    model: nn.Module, given: Sequence[Tensor], dims: Sequence[int], chunks: int
) -> bool:
    size = given[0].shape[dims[0]]
    try:
        for part in torch.arange(size).tensor_split(chunks):
            _seeded(
                model,
                [x.narrow(d, int(part[0]), len(part)) for x, d in zip(given, dims, strict=True)],
                0,
            )
    except Exception:
        return False
    return True


# -------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class _Step:
    results: tuple[Tensor, ...]
    gradients: list[Tensor | None] | None


def _seeded(model: nn.Module, given: Sequence[Tensor], seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        results: tuple[Tensor, ...] = fresh(*(x.detach().clone() for x in given))
    return tuple(x.clone() for x in results)


def _step(model: nn.Module, given: Sequence[Tensor], *, backward: bool = True) -> _Step:
    """Forward and backward; forward alone where eager torch has no (real) gradient."""
    fresh = copy.deepcopy(model)
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in given]
    results = fresh(*inputs)
    values = tuple(x.detach() for x in results)
    if not backward:
        return _Step(values, None)
    try:
        objective(results).backward()
    except (RuntimeError, NotImplementedError):
        if isinstance(model, autopipe.Pipeline):
            raise
        return _Step(values, None)
    tensors = [*inputs, *fresh.parameters()]
    return _Step(values, [x.grad for x in tensors if x.requires_grad])


def _difference(found: _Step, expected: _Step) -> str:
    """Where a step in micro-batches is not eager's; "" if it is."""
    for n, (x, y) in enumerate(zip(found.results, expected.results, strict=True)):
        if not _close(x, y):
            return f"result {n}"
    for n, (g, h) in enumerate(zip(found.gradients or (), expected.gradients or (), strict=True)):
        if not _same_gradient(g, h):
            return f"gradient {n}"
    return ""


def _same_gradient(found: Tensor | None, expected: Tensor | None) -> bool:
    """None is as good as zeros: what counts is what an optimizer would do."""
    if found is None or expected is None:
        other = found if expected is None else expected
        return other is None or not other.any()
    return _close(found, expected)


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    finite = expected[expected.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    atol = TOLERANCE.get(expected.dtype, 2e-2) * scale
    return torch.allclose(found, expected, rtol=0, atol=atol, equal_nan=True)


# ---------------------------------------------------------------------------------------- wording


def _short(error: Exception) -> str:
    lines = str(error).splitlines()
    return " | ".join(line.strip() for line in lines[:3])[:240]


def _described(model: Applied, given: Sequence[Tensor]) -> str:
    leaves: list[Any] = list(model.leaves)
    for n, x in zip(model.batched, given, strict=True):
        leaves[n] = f"batched{list(x.shape)}"
    for n in model.held:
        leaves[n] = f"held{list(getattr(model, f'held{n}').shape)}"
    first, args, kwargs = pytree.tree_unflatten(leaves, model.structure)
    return f"{first} {args} {kwargs}"[:300]
