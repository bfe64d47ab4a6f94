"""What a forward leaves behind in the attributes of a model's modules, buffers among them.

A graph has no Python attributes: what the model's next call would find there, a captured model
never sees. A cache that would be the same is harmless, a counter by which a loss is warmed up or a
state that is carried to the next batch is not. So a model that sets attributes is traced a second
time, with what it left. If that gives another graph, real calls on two samples decide. Buffers are
part of the model's state: where one is made or remade in the forward, real calls decide at once.
(Assigning one that looks as before is no matter of this file, but a write: `assigned`.)
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.errors import AutopipeError, CaptureError
from autopipe.passes._torch import FakeTensor
from autopipe.passes.graph import fingerprint, is_close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from .flat_module import Flat
    from .normalize import Normalized

PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
OWN = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs"}
"""What torch itself keeps there: parameters, hooks, weights of recurrent layers once more."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
"""A forward may register some, and remember in an attribute that it has."""


class Absent:
    """Stands for an attribute that is not there."""


class Attribute(NamedTuple):
    """One attribute, or buffer, of one module, before and after a forward."""

    path: str
    module: nn.Module
    name: str
    is_buffer: bool
    before: Any
    after: Any

    @property
    def holder(self) -> dict[str, Any]:
        return self.module._buffers if self.is_buffer else vars(self.module)

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


def attributes(model: nn.Module) -> dict[tuple[str, str, bool], Any]:
    """Every module's own attributes, its forward hooks and (True) buffers; containers are copied,
    what they hold is not."""
    hooks = {
        (path, name, False): dict(vars(module)[name])
        for path, module in model.named_modules()
        for name in HOOKS
        if name in vars(module)
    }
    return hooks | {
        (path, name, holder is module._buffers): pytree.tree_map(lambda x: x, value)
        for path, module in model.named_modules()
        for holder in (vars(module), module._buffers)
        for name, value in holder.items()
        if name not in OWN and not isinstance(value, nn.Module) and not _recomputed(module, name)
    }


def _recomputed(module: nn.Module, name: str) -> bool:
    """A weight that torch's hooks (weight norm, spectral norm, pruning) set before every call."""
    return f"{name}_orig" in module._parameters or f"{name}_g" in module._parameters


def changes(model: nn.Module, before: dict[tuple[str, str, bool], Any]) -> list[Attribute]:
    """What differs now from a snapshot made earlier."""
    modules = dict(model.named_modules())
    after = attributes(model)
    return [
        Attribute(key[0], modules[key[0]], *key[1:], old, new)
        for key in {**before, **after}
        if key[0] in modules
        and not _same(old := before.get(key, Absent), new := after.get(key, Absent))
    ]


def put(changed: Iterable[Attribute], which: str) -> None:
    """Set attributes to what they were "before" or "after"."""
    for item in changed:
        value = getattr(item, which)
        if item.name in HOOKS:  # in place: a hook's handle knows the registry
            item.holder[item.name].clear()
            item.holder[item.name].update(value)
        elif value is Absent:
            item.holder.pop(item.name, None)
        else:
            item.holder[item.name] = pytree.tree_map(lambda x: x, value)


@contextmanager
def held_buffers(model: nn.Module) -> Iterator[None]:
    """Leave every module with the buffers that it has: objects, names, their order."""
    kept: list[tuple[Any, Any]] = [
        (registry, registry.copy())
        for module in model.modules()
        if isinstance(module._buffers, dict)  # else it is scripted, and has no Python state
        for registry in (module._buffers, module._non_persistent_buffers_set)
    ]
    try:
        yield
    finally:
        for registry, content in kept:
            registry.clear()
            registry.update(content)


def _same(a: Any, b: Any) -> bool:
    (left, spec), (right, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return spec == other and all(map(_equal, left, right))


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, PLAIN) and bool(a == b))


def forgotten(
    flat: Flat,
    traced: Normalized,
    again: Callable[[], Normalized],
    examples: Sequence[Tensor],
    dims: Sequence[int | None],
) -> list[str]:
    """Attributes that the forward sets in every call, and that no later call needs.

    Args:
        flat: the model, just `traced`.
        again: traces it once more.
        examples: its tensors, with at least two samples in their entry of `dims`.

    Raises:
        CaptureError: the next call would compute something else.
    """
    left = flat.result.remains
    if not left:
        return []
    same = False
    if not any(a.is_buffer for a in left):
        put(left, "after")
        try:
            same = _equal_programs(traced, again())
        except AutopipeError:
            pass
        finally:
            put(left, "before")
    if not same and not _computes_the_same(flat, examples, dims):
        raise CaptureError(
            "the model keeps state in attributes of its modules: its next call would compute"
            " something else, a captured model would not",
            expected="a second call, on the same inputs, that gives the same",
            found=", ".join(map(str, left)),
            remedy="keep it in a buffer (register_buffer) that has its shape and type from the"
            " start, or pass it in",
        )
    return [str(a) for a in flat.result.remains]


def _equal_programs(a: Normalized, b: Normalized) -> bool:
    pairs = zip(a.constants.values(), b.constants.values(), strict=False)
    return (
        fingerprint(a.graph) == fingerprint(b.graph)
        and len(a.constants) == len(b.constants)
        and all(torch.equal(x, y) for x, y in pairs)
    )


def _computes_the_same(flat: Flat, examples: Sequence[Tensor], dims: Sequence[int | None]) -> bool:
    """Real calls: two samples, with and without what a call on other samples left."""
    model = flat.model
    tensors = [*examples, *model.parameters(), *model.buffers()]
    if any(t.is_meta or isinstance(t, FakeTensor) for t in tensors):
        return False

    def samples(*which: int) -> list[Tensor]:
        return [
            x.detach() if d is None else x.detach().index_select(d, x.new_tensor(which).long())
            for x, d in zip(examples, dims, strict=True)
        ]

    fresh = _left_by(flat, [samples(0, 1)])
    again = _left_by(flat, [samples(0, 0), samples(0, 1)])
    return len(fresh) == len(again) and all(map(_alike, fresh, again))


def _left_by(flat: Flat, calls: Sequence[Sequence[Tensor]]) -> list[Any]:
    """The last call's results, and what the model's buffers are then: as it changed them, given
    those of before the first call; and those made or remade by any call."""
    held = [(b, b.clone()) for b in flat.model.buffers()]
    left: list[list[Attribute]] = []
    results: list[Tensor] = []
    with held_buffers(flat.model):
        try:
            for given in calls:
                with torch.no_grad(), torch.random.fork_rng():
                    torch.manual_seed(0)
                    results = [*flat(*given)]
                results += [b.clone() for b, _ in held]
                left.append(flat.result.remains)
                put(left[-1], "after")
                fill(held)
            made = {(a.path, a.name): a.holder.get(a.name) for c in left for a in c if a.is_buffer}
            return [*results, *made.items()]
        finally:
            fill(held)
            for changed in reversed(left):
                put(changed, "before")


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):  # a buffer, by its name
        return a[0] == b[0] and _alike(a[1], b[1])
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return is_close(a, b)
    return _same(a, b)


def fill(held: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give tensors the values that were kept of them."""
    with torch.no_grad():
        for tensor, value in held:
            tensor.copy_(value)
