"""Why a call was captured: what differs from the captured call that is most like it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from autopipe.call_numbers import changed_numbers
from autopipe.call_signature import changed_leaves, described
from autopipe.compiled_models import CallKey, ModelKey
from autopipe.errors import shortened, shown
from autopipe.model_state_key import model_state_key
from autopipe.passes.capture import argument_names, leaf_names
from autopipe.passes.python_state import ambient_modes

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from torch import nn

    from autopipe.call_signature import CallInputs, CallSignature
    from autopipe.compiled import CompiledModel

LONGEST = 300
"""Characters of a reason."""

REMEDIES = {
    "first": "",
    "mode": "each mode is captured for itself; this is no loss",
    "number": "the model uses this number for more than computing; pass it as a tensor, or few"
    " different numbers",
    "value": "pass an argument that changes from call to call as a tensor",
    "structure": "pass the same arguments in every call, with tensors of the same dtypes and"
    " numbers of dimensions; for a mask that is None at times, a mask that masks nothing",
    "settings": "set what changes once, before training",
    "attribute": "keep attributes of the model between calls; what changes can be a buffer",
    "size": "name a size that changes beforehand: compile(..., dynamic={argument: {dimension:"
    " name}}); or pad to few sizes",
    "branch": "the model takes another branch for these sizes or numbers; pass similar ones",
}
"""What to do, by the kind of a reason."""


class CaptureReason(NamedTuple):
    """Why a call was captured.

    Attributes:
        kind: a key of `REMEDIES`.
        text: what changed, from what to what.
    """

    kind: str
    text: str

    @property
    def remedy(self) -> str:
        """What the reader can do; empty if nothing."""
        return REMEDIES[self.kind]


def reason_for(
    model: nn.Module,
    call: CallKey,
    inputs: CallInputs,
    known: Sequence[tuple[CompiledModel, ModelKey]],
) -> CaptureReason:
    """Say what makes a call differ from the captured call that is most like it.

    Args:
        model: the user's module.
        call: the key of the call.
        inputs: the call.
        known: captured models that are still kept, least recently used first.
    """
    if not known:
        return CaptureReason("first", "the first call")
    # A key has the attributes that the captured forward read: the call's has the same ones.
    states = ((c, key, c.split.captured.reads.names) for c, key in reversed(known))
    pairs = [(c, old, ModelKey(model_state_key(model, n), call)) for c, old, n in states]
    compiled, old, new = max(pairs, key=lambda one: _likeness(one[1], one[2]))
    same = old.call.signature.spec == call.signature.spec
    numbers = changed_numbers(inputs.leaves, compiled.calls.constants) if same else []
    reasons = [*_key_reasons(old, new, argument_names(model), numbers)] or [
        _size_reason(model, inputs, compiled)
    ]
    text = shortened("; ".join(r.text for r in reasons), LONGEST)
    return CaptureReason(reasons[0].kind, text)


def _likeness(one: ModelKey, other: ModelKey) -> tuple[int, bool]:
    pairs = [*zip(one.call, other.call, strict=True), (one.state, other.state)]
    return sum(a == b for a, b in pairs), one.call.signature.spec == other.call.signature.spec


def _key_reasons(
    old: ModelKey, new: ModelKey, names: Sequence[str], numbers: Sequence[int]
) -> Iterator[CaptureReason]:
    modes = {True: "training", False: "evaluation"}
    if old.call.training != new.call.training:
        yield CaptureReason(
            "mode", f"mode: {modes[old.call.training]} → {modes[new.call.training]}"
        )
    if old.call.signature != new.call.signature or numbers:
        yield _signature_reason(old.call.signature, new.call.signature, names, numbers)
    for name, a, b in zip(ambient_modes(), old.call.settings, new.call.settings, strict=False):
        if a != b:
            yield CaptureReason("settings", f"{name}: {a} → {b}")
    if old.call.training == new.call.training and old.state != new.state:
        yield CaptureReason("attribute", _state_difference(old.state, new.state))


def _signature_reason(
    old: CallSignature, new: CallSignature, names: Sequence[str], numbers: Sequence[int]
) -> CaptureReason:
    changed = changed_leaves(old, new, names, numbers)
    if changed is None:
        return CaptureReason("structure", f"arguments: {described(old)} → {described(new)}")
    kind = "structure" if any(c.of_tensor for c in changed) else "value"
    texts = (f"{c.argument}: {c.old} → {c.new}" for c in changed)
    only = "number" if len(changed) == len(numbers) else kind
    return CaptureReason(only, "argument " + ", ".join(texts))


def _state_difference(old: Hashable, new: Hashable) -> str:
    """The first entry in which two keys of a model's state differ, as text."""
    if not isinstance(old, tuple) or not isinstance(new, tuple):
        return "the model has changed"
    place = "the model"
    for a, b in zip(old, new, strict=False):
        if a == b:
            place = a.__name__ if isinstance(a, type) else place
            continue
        if isinstance(b, bool) and isinstance(a, bool):
            modes = {True: "training", False: "evaluation"}
            return f"mode of a {place}: {modes[a]} → {modes[b]}"
        if _is_entry(a) and _is_entry(b) and a[0] == b[0]:
            return f"attribute {_name(a[0])} of {place}: {_change(_value(a), _value(b))}"
        name = b[0] if _is_entry(b) else a[0] if _is_entry(a) else None
        return f"{place}: {'its layers or hooks' if name is None else _name(name)} changed"
    return f"attributes of {place} were added or removed"


def _change(old: str, new: str) -> str:
    return f"{old} → {new}" if old != new else f"another {new}"


def _is_entry(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 1 and isinstance(value[0], (str, tuple))


def _value(entry: Any) -> str:
    """The value in an entry of a state key, which may stand beside its type."""
    last = entry[-1]
    paired = isinstance(last, tuple) and len(last) == 2 and isinstance(last[0], type)
    if not paired:
        return shown(last)
    return shown(float(last[1]) if last[0] is float else last[1])


def _name(name: Any) -> str:
    """``config.layers[0]`` for the nested names of a state key."""
    if not isinstance(name, tuple):
        return str(name)
    if len(name) != 2:
        return shown(name)
    inner, last = name
    return f"{_name(inner)}[{last}]" if isinstance(last, int) else f"{_name(inner)}.{last}"


def _size_reason(model: nn.Module, inputs: CallInputs, compiled: CompiledModel) -> CaptureReason:
    """For calls whose keys are the same: sizes, values that the forward read, or branches."""
    known = compiled.calls
    changed = known.changed_read(inputs)
    if changed is not None:
        return CaptureReason("attribute", f"{changed} has another value")
    tensors = [n for n, x in enumerate(inputs.leaves) if isinstance(x, Tensor)]
    names = leaf_names(model, inputs.leaves, inputs.spec)
    found = [
        f"dimension {d} of {names[n]}: {old} → {new}"
        for n in tensors
        for d, (old, new) in enumerate(zip(known.shapes[n], inputs.leaves[n].shape, strict=True))
        if old != new and d != inputs.batch_dims[n] and d not in known.lengths[n]
    ]
    if found:
        return CaptureReason("size", ", ".join(found))
    if not compiled.split.captured.number_guards.hold_for(inputs.leaves):
        values = ", ".join(f"{names[n]} = {inputs.leaves[n]}" for n in sorted(known.numbers))
        return CaptureReason("branch", f"the captured branches are not those for {values}")
    shapes = ", ".join(f"{names[n]}: {tuple(inputs.leaves[n].shape)}" for n in tensors)
    return CaptureReason("branch", f"the captured branches are not those for sizes {shapes}")
