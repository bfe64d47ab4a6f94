"""`Pipeline.verify`: the pipeline against the model itself, on one batch.

Everything is compared that a training step leaves behind: results, gradients, buffers. If
something differs, two further comparisons find where: each submodule's result with the captured
graph's (what capture got wrong), and each value that a stage sent with the captured graph's (what
the pipeline got wrong).
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.locate import holder, locate
from autopipe.passes._torch import CheckpointFunction
from autopipe.passes.graphs import is_random, source_line
from autopipe.report.table import columns
from autopipe.runtime.executor import Run
from autopipe.stilled import MicroBatchNorm, Still
from autopipe.structure import flatten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from autopipe.module import Pipeline

aten = torch.ops.aten

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the largest entry (for gradients: of any gradient): rounding in another order of summation."""


@dataclass(frozen=True)
class Difference:
    """One tensor of the model's step against the pipeline's.

    kind: "output", "gradient" or "buffer".
    largest: largest absolute difference of two entries (nan where only one of them is nan).
    scale: largest entry of the model's tensor; of all its gradients for a gradient.
    """

    kind: str
    name: str
    largest: float
    scale: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Equal but for rounding."""
        return self.largest <= self.tolerance * self.scale


@dataclass(frozen=True)
class Verification:
    """What `Pipeline.verify` found.

    differences: one per result, gradient and buffer.
    stage, node: where the first value that differs is made, if one does; `node` is a name in
        `Pipeline.captured`.
    notes: under what conditions the two were compared.
    """

    differences: tuple[Difference, ...]
    stage: int | None
    node: str | None
    source: str | None
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Everything is equal but for rounding."""
        return all(d.ok for d in self.differences)

    def worst(self, kind: str) -> Difference | None:
        """The largest difference of a kind, relative to its scale."""
        found = [d for d in self.differences if d.kind == kind]
        return max(found, key=lambda d: d.largest / d.scale if d.scale else d.largest, default=None)

    def __str__(self) -> str:
        rows: list[list[str]] = []
        for kind in ("output", "gradient", "buffer"):
            worst = self.worst(kind)
            if worst is not None:
                found = [d for d in self.differences if d.kind == kind]
                equal = f"{sum(d.ok for d in found)} of {len(found)}"
                rows.append([kind, equal, f"{worst.largest:.2e}", f"{worst.scale:.2e}", worst.name])
        lines = [*columns([["", "equal", "largest difference", "of", "in"], *rows])]
        if not self.ok:
            place = f"stage {self.stage}, node {self.node}" if self.node else "no node found"
            source = f" ({self.source})" if self.source else ""
            lines.append(f"first difference: {place}{source}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def compare(
    pipe: Pipeline, args: tuple[Any, ...], kwargs: Mapping[str, Any], tolerance: float | None
) -> Verification:
    """See `Pipeline.verify`."""
    leaves, spec = flatten(args, kwargs)
    captured = pipe._prepare(args, kwargs, leaves, spec, strict=False)[0].split.captured
    notes = []
    with ExitStack() as stack:
        if any(map(is_random, captured.graph_module.graph.nodes)):
            notes.append("random calls were stilled in both: dropout drops nothing")
            stack.enter_context(Still())
            pipe = type(pipe)(pipe.model, pipe.options)
        compiled, ready, _ = pipe._prepare(args, kwargs, leaves, spec, strict=False)
        captured, sizes = compiled.split.captured, ready.program.sizes
        if any(n.target is aten.batch_norm.default for n in captured.graph_module.graph.nodes):
            notes.append("the model's batch norm, too, normalised by micro-batch")
        deferred = pipe.options.batch_norm == "deferred"
        modules: dict[str, Tensor] = {}
        normalising = MicroBatchNorm(sizes, deferred=deferred)
        own_call = mock.patch.object(pipe.model, "_compiled_call_impl", None)  # `install`
        # A reentrant checkpoint refuses to tell gradients apart from `.grad`: no checkpoints.
        plain = mock.patch.object(CheckpointFunction, "apply", _checkpointed)
        with _restored(pipe.model), own_call, normalising, plain, _watched(pipe.model, modules):
            expected = _Step.of(pipe.model, pipe.model, leaves, spec)
        observed: dict[tuple[str, int], Tensor] = {}
        with _restored(pipe.model):
            found = _Step.of(pipe.model, partial(_observed, pipe, observed), leaves, spec)
        differences = tuple(expected.against(found, tolerance))
        place = None
        if not all(d.ok for d in differences):
            place = locate(compiled, sizes, leaves, observed, modules)
            place = place or holder(compiled, [d.name for d in differences if not d.ok])
    if place is None:
        return Verification(differences, None, None, None, tuple(notes))
    stage, node = place
    return Verification(differences, stage, node.name, source_line(node), tuple(notes))


def _checkpointed(run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    """What a reentrant checkpoint returns, and nothing is run again."""
    return run(*args)


def _observed(
    pipe: Pipeline, observed: dict[tuple[str, int], Tensor], *args: Any, **kwargs: Any
) -> Any:
    """The pipeline's forward; what its stages send is noted."""
    send = Run.send

    def noting(run: Run, what: str, source: int, to: int, m: int, tensor: Tensor) -> None:
        observed.setdefault((what, m), tensor.detach())
        send(run, what, source, to, m, tensor)

    with mock.patch.object(Run, "send", noting):
        return pipe(*args, **kwargs)


@dataclass(frozen=True)
class _Step:
    """What one training step leaves behind, by name."""

    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, model: nn.Module, run: Callable[..., Any], leaves: Sequence[Any], spec: pytree.TreeSpec
    ) -> _Step:
        own = [
            x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for x in leaves
        ]
        args, kwargs = pytree.tree_unflatten(own, spec)
        result = run(*args, **kwargs)
        outputs = {f"result{n}": x for n, x in _named(result) if isinstance(x, Tensor)}
        wanted: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        wanted |= {
            f"input {n}": x for n, x in enumerate(own) if isinstance(x, Tensor) and x.requires_grad
        }
        roots = {n: x for n, x in outputs.items() if x.requires_grad}
        losses = {n: x for n, x in roots.items() if x.numel() == 1}
        roots = losses or roots
        gradients: Mapping[str, Tensor | None] = {}
        if roots and wanted:
            found = torch.autograd.grad(
                list(roots.values()),
                list(wanted.values()),
                [_weights(x) for x in roots.values()],
                allow_unused=True,
            )
            gradients = dict(zip(wanted, found, strict=True))
        return cls(
            {n: x.detach() for n, x in outputs.items()},
            gradients,
            {n: b.clone() for n, b in model.named_buffers()},
        )

    def against(self, found: _Step, tolerance: float | None) -> Iterator[Difference]:
        """The pipeline's step compared with this one, the model's."""
        for name, value in found.outputs.items():
            if name in self.outputs:
                yield _difference("output", name, self.outputs[name], value, tolerance)
        scale = max((_scale(g) for g in self.gradients.values() if g is not None), default=0.0)
        for name, expected in self.gradients.items():
            value_or_none = found.gradients.get(name)
            if expected is None and value_or_none is None:
                continue
            zero = next(g for g in (expected, value_or_none) if g is not None) * 0
            a = zero if expected is None else expected
            b = zero if value_or_none is None else value_or_none
            yield _difference("gradient", name, a, b, tolerance, scale)
        for name, value in found.buffers.items():
            yield _difference("buffer", name, self.buffers[name], value, tolerance)


def _named(result: Any) -> list[tuple[str, Any]]:
    """The leaves of a result, by the way to them where its classes tell it, else numbered."""
    try:
        return [(pytree.keystr(p), x) for p, x in pytree.tree_leaves_with_path(result)]
    except ValueError:  # a container registered without keys
        return [(f"[{n}]", x) for n, x in enumerate(pytree.tree_leaves(result))]


def _weights(root: Tensor) -> Tensor:
    """A gradient for an output: one for a loss, else something that tells entries apart."""
    if root.numel() == 1:
        return torch.ones_like(root)
    steps = torch.linspace(0.5, 1.5, root.numel(), device=root.device)
    return steps.to(root.dtype).view(root.shape)


def _difference(
    kind: str,
    name: str,
    expected: Tensor,
    found: Tensor,
    tolerance: float | None,
    scale: float | None = None,
) -> Difference:
    allowed = tolerance if tolerance is not None else TOLERANCE.get(expected.dtype, 0.0)
    if expected.shape != found.shape:
        return Difference(kind, name, float("inf"), _scale(expected), allowed)
    found = found.to(expected.device)
    a, b = _exact(expected), _exact(found)
    equal = (a == b) | (a.isnan() & b.isnan())
    apart = (a - b).abs().masked_fill(equal, 0.0)
    largest = apart.max().item() if apart.numel() else 0.0
    return Difference(kind, name, largest, _scale(expected) if scale is None else scale, allowed)


def _exact(value: Tensor) -> Tensor:
    return value.detach().to(torch.complex128 if value.is_complex() else torch.float64)


def _scale(value: Tensor) -> float:
    finite = _exact(value).abs()
    finite = finite[finite.isfinite()]
    return finite.max().item() if finite.numel() else 0.0


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Leave a model's buffers and the random state as they were."""
    before = [(b, b.clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def _watched(model: nn.Module, results: dict[str, Tensor]) -> Iterator[None]:
    """Note the (first) tensor that each submodule returns, of those called once."""
    again: set[str] = set()

    def hook(path: str, result: Any) -> None:
        tensor = next((x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)), None)
        if path in results or path in again or tensor is None:
            again.add(path)
            results.pop(path, None)
        else:
            results[path] = tensor.detach().clone()

    handles = [
        m.register_forward_hook(lambda m, args, result, path=path: hook(path, result))
        for path, m in model.named_modules()
        if path
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
