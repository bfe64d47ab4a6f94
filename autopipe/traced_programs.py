"""`TracedPrograms`: the programs of one captured model, and which sizes they serve.

    ProgramKey (exact sizes) ──▶ `CompiledProgram`: cheap, for one shape of inputs
        ──▶ a `Phased` for each micro-batch size: traced with numbers, or with symbolic sizes, when
            it serves all sizes that satisfy its conditions
        ──▶ code, shared by all keys with the same `Phased`s

A trace with symbolic sizes takes some times as long as one with numbers. So sizes are symbolic if
the capture has lengths, or from the third micro-batch size on. Where torch cannot trace with
symbolic sizes, or fixes them, stages are traced once for each shape.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import sympy

from autopipe.compiled_program import CompiledProgram
from autopipe.errors import InputError, describe
from autopipe.passes.driver import lower_to_code, phases_by_size
from autopipe.passes.graph import warn_at_user_line
from autopipe.passes.ir import B
from autopipe.passes.one_at_a_time import one_at_a_time
from autopipe.passes.phases import PhaseRequest, TraceCache, received_strides
from autopipe.runtime.executor import Program
from autopipe.runtime.load import load_source
from autopipe.tensor_meta import state_metadata, symbolic_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from torch import Tensor

    from autopipe.compiled_program import ProgramKey
    from autopipe.options import Options
    from autopipe.passes.driver import Lowered
    from autopipe.passes.ir import Input, Phased, Sizes, Split
    from autopipe.passes.phases import TensorMeta
    from autopipe.runtime.transfer import WorkerDevice

logger = logging.getLogger("autopipe")

STATIC_SIZES = 2
"""As many micro-batch sizes are traced with numbers before sizes become symbolic."""

FIXED_TRACES = 2
"""After as many traces in which torch fixed a symbolic size, traces are for one shape each."""

MANY_SHAPES = 64
"""How many shapes of inputs have a `CompiledProgram` of their own."""


class _Code(NamedTuple):
    """A loaded program.

    Attributes:
        phased: the phases of each micro-batch.
        lowered: schedule and source.
        names: what the source defines.
        filename: under which `linecache` has it.
    """

    phased: tuple[Phased, ...]
    lowered: Lowered
    names: dict[str, Any]
    filename: str


class TracedPrograms:
    """The programs of one captured model.

    Args:
        split: the stages.
        options: resolved.
        workers: one per stage.
        traces: traces of these stages so far.
        tensor: returns the tensor of a placeholder.

    Attributes:
        seconds: spent on tracing and generating code.
        generated: how many programs were generated.
    """

    def __init__(
        self,
        split: Split,
        options: Options,
        workers: tuple[WorkerDevice, ...],
        traces: TraceCache,
        tensor: Callable[[Input], Tensor],
    ) -> None:
        self._split, self._options, self._workers = split, options, workers
        self._traces, self._tensor = traces, tensor
        self._programs: OrderedDict[ProgramKey, tuple[CompiledProgram, Hashable]] = OrderedDict()
        self._static: dict[Hashable, Phased] = {}
        self._symbolic: dict[Hashable, list[Phased]] = {}
        self._sizes_traced: dict[Hashable, set[int]] = {}  # with numbers, by modes
        self._fixed: dict[Hashable, int] = {}  # how often torch fixed a symbolic size, by modes
        self._code: dict[Hashable, _Code] = {}
        self.seconds, self.generated = 0.0, 0
        self._said = False

    def program(
        self, key: ProgramKey, progress: Callable[[str], None]
    ) -> tuple[CompiledProgram, Hashable]:
        """Return the program for a key, and the key of its code.

        Args:
            key: of the program.
            progress: called with a text for each step.

        Raises:
            InputError: a batch norm would see a single value per channel.
        """
        found = self._programs.get(key)
        if found is not None:
            with suppress(KeyError):  # another thread may just forget it
                self._programs.move_to_end(key)
            return found
        with one_at_a_time():
            if key not in self._programs:
                self._add(key, progress)
            return self._programs[key]

    def _add(self, key: ProgramKey, progress: Callable[[str], None]) -> None:
        start = perf_counter()
        phased = {size: self._phased(key, size, progress) for size in dict.fromkeys(key.sizes)}
        code_key = tuple(id(phased[size]) for size in key.sizes)
        if code_key not in self._code:
            self._code[code_key] = self._load(phased, key.sizes, progress)
            self.generated += 1
            seconds = perf_counter() - start
            self.seconds += seconds
            logger.info("traced in %.2f s: micro-batches of %s", seconds, key.sizes)
        self._traces.joints.clear()  # every stage is cut
        self._programs[key] = _program(self._code[code_key], phased, key, self._workers), code_key
        if len(self._programs) > MANY_SHAPES:
            self._programs.popitem(last=False)

    def forget(self, code_key: Hashable) -> None:
        """Free a program's code, and the traces that no other program uses.

        Args:
            code_key: as `program` returned it.
        """
        if self._code.pop(code_key, None) is None:
            return
        for key in [k for k, (_, used) in self._programs.items() if used == code_key]:
            del self._programs[key]
        used = {id(p) for other in self._code.values() for p in other.phased}
        self._static = {k: p for k, p in self._static.items() if id(p) in used}
        symbolic = {k: [p for p in ps if id(p) in used] for k, ps in self._symbolic.items()}
        self._symbolic = {k: ps for k, ps in symbolic.items() if ps}
        kept = self._traces.restricted_to(p for c in self._code.values() for p in c.phased)
        self._traces = TraceCache(stages=kept.stages)

    @property
    def codes(self) -> tuple[Hashable, ...]:
        """The keys of all code that is kept."""
        return tuple(self._code)

    @property
    def is_empty(self) -> bool:
        """Whether no code is left."""
        return not self._code

    def _phased(self, key: ProgramKey, size: int, progress: Callable[[str], None]) -> Phased:
        """The phases of one micro-batch size."""
        inputs = key.metadata(size)
        exact: Hashable = (key.modes, size, tuple(inputs.items()))
        if exact in self._static:
            return self._static[exact]
        sizes: Sizes = {B: size, **dict(key.lengths)}
        if symbols := self._symbols(key, sizes):
            metadata = symbolic_metadata(self._split.captured, inputs, sizes, symbols)
            pattern: Hashable = (key.modes, tuple(metadata.items()))
            known = self._symbolic.setdefault(pattern, [])
            found = next((p for p in known if p.holds_for(sizes)), None)
            if found is None:
                found = self._traced_symbolically(key, size, metadata, progress)
                if found is not None:
                    known.append(found)
            if found is not None:
                return found
        found = phases_by_size(self._request(key, size, inputs), self._traces, progress)[size]
        self._static[exact] = found
        self._sizes_traced.setdefault(key.modes, set()).add(size)
        return found

    def _symbols(self, key: ProgramKey, sizes: Sizes) -> set[Any]:
        """The sizes that are symbolic in the next trace."""
        if self._fixed.get(key.modes, 0) >= FIXED_TRACES:
            return set()
        lengths = {s for s, n in sizes.items() if s != B and n > 1}
        several = len(self._sizes_traced.get(key.modes, ())) >= STATIC_SIZES
        return lengths | ({B} if sizes[B] > 1 and (lengths or several) else set())

    def _traced_symbolically(
        self,
        key: ProgramKey,
        size: int,
        metadata: dict[str, TensorMeta],
        progress: Callable[[str], None],
    ) -> Phased | None:
        """The phases for symbolic sizes; None if torch cannot trace them."""
        try:
            request = self._request(key, size, metadata)
            found = phases_by_size(request, self._traces, progress)[size]
        except InputError:  # the call is wrong for any trace
            raise
        except Exception as error:  # an operator may raise anything for a size that is no integer
            self._fixed[key.modes] = FIXED_TRACES
            self._say(describe(error))
            return None
        if any(isinstance(c, sympy.Eq) for c in found.conditions):
            self._fixed[key.modes] = self._fixed.get(key.modes, 0) + 1
            logger.info("a size is fixed in the trace: %s", found.conditions)
            if self._fixed[key.modes] >= FIXED_TRACES:
                self._say(f"torch fixes sizes: {', '.join(map(str, found.conditions))}")
        return found

    def _say(self, reason: str) -> None:
        """Say that stages are traced for each shape from now on: a warning, the first time."""
        logger.info("stages are traced for each shape: %s", reason)
        if not self._said:
            self._said = True
            warn_at_user_line(
                f"each new size costs a trace of the stages: torch cannot trace them for any size"
                f" ({reason}); pad to few sizes (said once)"
            )

    def _request(self, key: ProgramKey, size: int, inputs: dict[str, TensorMeta]) -> PhaseRequest:
        state = state_metadata(self._split.captured, self._tensor)
        return PhaseRequest(
            self._split,
            {size: state | inputs},
            tuple(w.device for w in self._workers),
            self._options.resolved.remat,
            key.grad,
            key.expected,
            dict(key.lengths),
        )

    def _load(
        self,
        phased: dict[int, Phased],
        sizes: Sequence[int],
        progress: Callable[[str], None],
    ) -> _Code:
        devices = tuple(w.device for w in self._workers)
        kind = self._options.schedule_kind
        lowered = lower_to_code(phased, sizes, devices, kind=kind, progress=progress)
        names, filename = load_source(lowered.generated.source)
        return _Code(tuple(phased[s] for s in sizes), lowered, names, filename)


def _program(
    code: _Code, phased: dict[int, Phased], key: ProgramKey, workers: tuple[WorkerDevice, ...]
) -> CompiledProgram:
    """A program with what it needs for the sizes of one key."""
    generated = code.lowered.generated
    sizes = {size: {B: size, **dict(key.lengths)} for size in phased}
    program = Program(
        forward=tuple(code.names[n] for n in generated.forward),
        backward=tuple(code.names[n] for n in generated.backward),
        workers=workers,
        sizes=key.sizes,
        draws={s: [k.draws for k in cut.stages] for s, cut in phased.items()},
        strides={
            (*message, size): strides
            for size, cut in phased.items()
            for message, strides in received_strides(cut, sizes[size]).items()
        },
        symbols={s: tuple(sizes[s][x] for x in cut.symbols) for s, cut in phased.items()},
        filename=code.filename,
    )
    lowered = code.lowered.with_phases(phased)
    return CompiledProgram(key, program, lowered)
