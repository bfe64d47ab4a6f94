"""`PartCompiler`: compile the parts of generated programs, and put them in the place of eager code.

A program is loaded with parts that run as they are written. Each part's function is then replaced,
in the program's names, by a `_PartCall`, which knows for which sizes there is compiled code. All
compiling happens before a program runs: workers only look it up.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from autopipe.errors import describe
from autopipe.interrupts import raise_deferred
from autopipe.passes.graph import warn_at_user_line
from autopipe.passes.inductor import (
    CompiledPart,
    ExpectedTensor,
    as_expected,
    compile_part,
    inductor_options,
    part_key,
)
from autopipe.passes.ir import all_hold
from autopipe.passes.one_at_a_time import one_at_a_time

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from torch import Tensor

    from autopipe.passes.ir import GraphPart, Sizes

logger = logging.getLogger("autopipe")

MOST_VARIANTS = 8
"""For as many sizes a part is compiled, if it cannot be compiled for all sizes at once."""

_first_call = threading.Lock()
"""Held while compiled code runs for the first time: it may load and tune kernels then."""

_compiled: WeakValueDictionary[tuple[Hashable, tuple[int, ...]], CompiledPart]
_compiled = WeakValueDictionary()
"""Compiled code of living programs, by what it computes and for which sizes it was compiled: other
programs use it, too."""


class PartCompiler:
    """Compiles the parts of one model's programs.

    Args:
        mode: one of `autopipe.passes.inductor.MODES`.

    Attributes:
        failures: what could not be compiled, and why.
    """

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self.failures: list[str] = []
        self._warned = False

    def bind(self, parts: Iterable[GraphPart], names: dict[str, Any]) -> tuple[_PartCall, ...]:
        """Replace the functions of parts in a loaded program.

        Args:
            parts: of the program.
            names: what its source defines.

        Returns:
            The replacements, which run eager code until they are prepared.
        """
        calls = tuple(_PartCall(part, names[part.name]) for part in parts)
        names |= {call.part.name: call for call in calls}
        return calls

    def prepare(
        self, calls: Iterable[_PartCall], sizes: Iterable[Sizes], progress: Callable[[str], None]
    ) -> None:
        """Compile parts for some sizes, as far as that is not done.

        Args:
            calls: of a program.
            sizes: values of all symbols, one for each micro-batch size.
            progress: called with a text for each part that is compiled.
        """
        options = inductor_options(self._mode)
        several = list(sizes)
        known = len(self.failures)
        for call in calls:
            for values in several:
                if all_hold(call.part.conditions, values) and not call.is_prepared(values):
                    raise_deferred()
                    progress(f"compiling {call.part.name}")
                    call.prepare(values, self._compile_for(call, values, options))
        if len(self.failures) > known and not self._warned:
            self._warned = True
            more = len(self.failures) - known - 1
            others = f" (and {more} more)" if more else ""
            warn_at_user_line(
                f"runs without inductor, as with backend='eager': {self.failures[known]}{others}"
            )

    def _compile_for(
        self, call: _PartCall, sizes: Sizes, options: Mapping[str, Any]
    ) -> CompiledPart | None:
        """Compiled code for some sizes; None if there is none."""
        found = next((c for c in call.variants if c.holds_for(sizes)), None)
        if found is not None:
            return found
        if len(call.variants) >= MOST_VARIANTS:
            self._note(call.part, f"it was compiled for {MOST_VARIANTS} sizes already")
            return None
        error: Exception | None = None
        for symbolic in (True, False) if call.part.symbols else (False,):
            try:
                found = _compiled_part(call.part, sizes, options, symbolic=symbolic)
            except Exception as raised:  # torch may raise anything
                error = raised
                logger.info("not compiled: %s: %s", call.part.name, describe(raised))
            else:
                call.variants.append(found)
                return found
        assert error is not None
        self._note(call.part, describe(error))
        return None

    def _note(self, part: GraphPart, reason: str) -> None:
        first = (reason.strip().splitlines() or ["?"])[0]
        self.failures.append(f"phase {part.phase} of stage {part.stage}: {first}")


@one_at_a_time()  # torch is patched meanwhile, and another thread's export switches settings
def _compiled_part(
    part: GraphPart, sizes: Sizes, options: Mapping[str, Any], *, symbolic: bool
) -> CompiledPart:
    """Compile a part, unless equal code is compiled for these sizes."""
    settings = tuple(sorted((name, str(value)) for name, value in options.items()))
    key = part_key(part), settings, symbolic
    for (known, _), compiled in list(_compiled.items()):
        if known == key and compiled.holds_for(sizes):
            return compiled
    found = compile_part(part, sizes, options, symbolic=symbolic)
    _compiled[key, tuple(sizes[s] for s in part.symbols)] = found
    return found


class _PartCall:
    """What generated code calls instead of a part's function.

    Args:
        part: the part.
        eager: its function.

    Attributes:
        variants: compiled code, each for some sizes.
    """

    def __init__(self, part: GraphPart, eager: Callable[[Any, list[Tensor]], list[Tensor]]) -> None:
        self.part, self.eager = part, eager
        self.variants: list[CompiledPart] = []
        self._ready: dict[tuple[int, ...], _Ready | None] = {}

    def is_prepared(self, sizes: Sizes) -> bool:
        """Whether it is decided what runs for some sizes."""
        return self._values(sizes) in self._ready

    def prepare(self, sizes: Sizes, compiled: CompiledPart | None) -> None:
        """Decide what runs for some sizes.

        Args:
            sizes: values of the symbols.
            compiled: code that holds for them; None: eager code.
        """
        ready = None if compiled is None else _Ready(compiled, sizes)
        self._ready[self._values(sizes)] = ready

    def __call__(self, ctx: Any, args: list[Tensor]) -> Sequence[Tensor]:
        ready = self._ready.get(ctx.sizes)
        if ready is None or not as_expected(args, ready.expected):
            return self.eager(ctx, args)
        return ready(args)

    def _values(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(sizes[s] for s in self.part.symbols)


class _Ready:
    """Compiled code for given sizes.

    Attributes:
        expected: the tensors that it takes.
    """

    def __init__(self, compiled: CompiledPart, sizes: Sizes) -> None:
        self._compiled, self._call = compiled, compiled.call
        self._numbers = [sizes[s] for s in compiled.symbols]
        self.expected: tuple[ExpectedTensor, ...] = compiled.expected(sizes)
        self._has_run = False

    def __call__(self, args: list[Tensor]) -> Sequence[Tensor]:
        arguments: list[Any] = [*self._numbers, *args]
        args.clear()
        if self._has_run:
            return self._call(arguments)
        with _first_call:
            results = self._call(arguments)
        self._has_run = True
        return results
