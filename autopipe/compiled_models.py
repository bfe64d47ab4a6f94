"""`CompiledModels`: the captured models of a pipeline, and the order in which programs were used.

One order holds the code of all captured models. What was not used for longest is forgotten first;
a captured model without code is dropped. A call whose backward is still to come holds its own
program, which keeps working.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from autopipe.call_signature import CallSignature
from autopipe.model_state_key import model_state_key
from autopipe.passes.one_at_a_time import one_at_a_time

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import nn

    from autopipe.compiled import CompiledModel


class CallKey(NamedTuple):
    """What decides which captured graph a call can use, besides the model's state and the batch.

    Attributes:
        training: mode of the model itself; the state has that of all its modules.
        signature: of the call's inputs.
        settings: torch's, as `ambient_settings` returns them.
    """

    training: bool
    signature: CallSignature
    settings: tuple[Any, ...]


class ModelKey(NamedTuple):
    """Everything, except sizes, that decides which captured graph a call can use."""

    state: Hashable
    call: CallKey


class CompiledModels:
    """Captured models by `ModelKey`, at most as many generated programs as asked for.

    Args:
        model: the user's module.
        most: number of generated programs that are kept.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        self._model, self._most = model, most
        self._models: dict[ModelKey, list[CompiledModel]] = {}
        # The attributes that count for the captures of each kind of call.
        self._names: dict[CallKey, dict[frozenset[str] | None, int]] = {}
        self._keys: dict[CompiledModel, ModelKey] = {}
        # Least recently used first; code None: nothing was generated yet.
        self._order: OrderedDict[tuple[CompiledModel, Hashable], None] = OrderedDict()

    def candidates(self, call: CallKey) -> list[CompiledModel]:
        """The captured models that a call can use as far as keys tell.

        Args:
            call: its key.
        """
        found: list[CompiledModel] = []
        for names in tuple(self._names.get(call, ())):
            found += self._models.get(ModelKey(model_state_key(self._model, names), call), ())
        return found

    def known(self) -> Sequence[tuple[CompiledModel, ModelKey]]:
        """All captured models with their keys, least recently used first."""
        recent = dict.fromkeys(compiled for compiled, _ in reversed(self._order))
        return [(c, self._keys[c]) for c in reversed(recent) if c in self._keys]

    def add(self, compiled: CompiledModel, call: CallKey) -> None:
        """Record a captured model by the attributes that its forward can have read.

        Args:
            compiled: the model.
            call: the key of the call that it was captured for, made after the capture: what
                capture itself changed is no reason for another.
        """
        names = compiled.split.captured.reads.names
        counts = self._names.setdefault(call, {})
        counts[names] = counts.get(names, 0) + 1
        key = ModelKey(model_state_key(self._model, names), call)
        self._models.setdefault(key, []).append(compiled)
        self._keys[compiled] = key
        self._order[compiled, None] = None

    def use(self, compiled: CompiledModel, code: Hashable) -> None:
        """Note that a call uses a program, and forget the least recently used beyond the limit.

        Args:
            compiled: the captured model.
            code: the key of the program's code.
        """
        if (compiled, code) in self._order:
            try:
                self._order.move_to_end((compiled, code))
            except KeyError:  # another thread has just forgotten it
                self._order[compiled, code] = None
            return
        with one_at_a_time():
            self._order[compiled, code] = None
            self._order.pop((compiled, None), None)
            self._count_backwards()
            while len(self._order) > self._most:
                oldest, unused = self._order.popitem(last=False)[0]
                oldest.programs.forget(unused)
                if oldest is not compiled and oldest.programs.is_empty:
                    self._drop(oldest)

    def _count_backwards(self) -> None:
        """Take up the code that backwards have generated: as the oldest, until a call uses it."""
        for compiled in self._keys:
            for code in compiled.programs.codes:
                if (compiled, code) not in self._order:
                    self._order[compiled, code] = None
                    self._order.move_to_end((compiled, code), last=False)

    def _drop(self, compiled: CompiledModel) -> None:
        key = self._keys.pop(compiled, None)
        if key is None:
            return
        self._models[key].remove(compiled)
        if not self._models[key]:
            del self._models[key]
        names, counts = compiled.split.captured.reads.names, self._names[key.call]
        counts[names] -= 1
        if not counts[names]:
            del counts[names]
        if not counts:
            del self._names[key.call]
