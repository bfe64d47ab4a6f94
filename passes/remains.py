"""What a forward leaves behind in the attributes of a model's modules.

A graph has no Python attributes: what the model's next call would find there, a captured model
never sees. A cache that would be the same is harmless, a counter by which a loss is warmed up or a
state that is carried to the next batch is not. So a model that sets attributes is traced a second
time, with what it left. If that gives another graph, two real calls on two samples decide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.errors import AutopipeError, CaptureError

from ._torch import FakeTensor
from .graphs import fingerprint
from .rounding import close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .flat import Flat
    from .normalize import Normalized

PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
OWN = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs"}
"""What torch itself keeps there: parameters, hooks, weights of recurrent layers once more."""


class Absent:
    """Stands for an attribute that is not there."""


class Attribute(NamedTuple):
    """One attribute of one module, before and after a forward."""

    path: str
    module: nn.Module
    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


def attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Every module's own attributes; containers are copied, what they hold is not."""
    return {
        (path, name): pytree.tree_map(lambda x: x, value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in OWN and not isinstance(value, nn.Module)
    }


def changes(model: nn.Module, before: dict[tuple[str, str], Any]) -> list[Attribute]:
    """What differs now from a snapshot made earlier."""
    modules = dict(model.named_modules())
    after = attributes(model)
    return [
        Attribute(key[0], modules[key[0]], key[1], old, new)
        for key in {**before, **after}
        if key[0] in modules
        and not _same(old := before.get(key, Absent), new := after.get(key, Absent))
    ]


def put(changed: Iterable[Attribute], which: str) -> None:
    """Set attributes to what they were "before" or "after"."""
    for item in changed:
        value = getattr(item, which)
        if value is Absent:
            vars(item.module).pop(item.name, None)
        else:
            vars(item.module)[item.name] = pytree.tree_map(lambda x: x, value)


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
    put(left, "after")
    try:
        second = again()
        same = _equal_programs(traced, second)
    except AutopipeError:
        same = False
    finally:
        last = flat.result.remains
        put(left, "before")
    if not same and not _computes_the_same(flat, examples, dims):
        raise CaptureError(
            "the model keeps state in attributes of its modules: its next call would compute"
            " something else, a captured model would not",
            expected="a second call, on the same inputs, that gives the same",
            found=", ".join(map(str, left)),
            remedy="keep it in a buffer that the forward changes in place (register_buffer), or"
            " pass it in",
        )
    return [str(a) for a in last]


def _equal_programs(a: Normalized, b: Normalized) -> bool:
    pairs = zip(a.constants.values(), b.constants.values(), strict=False)
    return (
        fingerprint(a.graph) == fingerprint(b.graph)
        and len(a.constants) == len(b.constants)
        and all(torch.equal(x, y) for x, y in pairs)
    )


def _computes_the_same(flat: Flat, examples: Sequence[Tensor], dims: Sequence[int | None]) -> bool:
    """Two calls of the model itself, the second with what the first left."""
    model = flat.model
    tensors = [*examples, *model.parameters(), *model.buffers()]
    if any(t.is_meta or isinstance(t, FakeTensor) for t in tensors):
        return False
    samples = [
        x.detach() if d is None else x.detach().narrow(d, 0, 2)
        for x, d in zip(examples, dims, strict=True)
    ]
    buffers = [b.clone() for b in model.buffers()]
    results, left = [], []
    try:
        for _ in range(2):
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(0)
                results.append(flat(*samples))
            left.append(flat.result.remains)
            put(left[-1], "after")
            _fill(model, buffers)
    finally:
        _fill(model, buffers)
        for changed in reversed(left):
            put(changed, "before")
    first, second = results
    return len(first) == len(second) and all(map(close, first, second))


def _fill(model: nn.Module, values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), values, strict=True):
            buffer.copy_(value)
