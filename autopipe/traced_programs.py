"""`TracedPrograms`: the programs of one captured model, and which sizes they serve.

ProgramKey (exact sizes) ──▶ `CompiledProgram`: cheap, for one shape of inputs
    ──▶ a `Phased` for each micro-batch size; see traced_stages.py
    ──▶ code, shared by all keys with the same `Phased`s
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from autopipe.compiled_parts import PartCompiler
from autopipe.compiled_program import CompiledProgram
from autopipe.graphed_stages import StageGrapher
from autopipe.passes.cost import least_offloaded, leaving_values, mean_op_seconds
from autopipe.passes.devices import CPU_CORE
from autopipe.passes.driver import lower_to_code
from autopipe.passes.ir import B
from autopipe.passes.one_at_a_time import one_at_a_time
from autopipe.passes.phases import received_strides
from autopipe.runtime.load import load_source
from autopipe.runtime.mailbox import queue_capacity
from autopipe.runtime.program import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from autopipe.compiled_program import ProgramKey
    from autopipe.options import Options
    from autopipe.passes.driver import Lowered
    from autopipe.passes.ir import Phased
    from autopipe.runtime.transfer import WorkerDevice
    from autopipe.traced_stages import TracedStages

logger = logging.getLogger("autopipe")

MANY_SHAPES = 64
"""How many shapes of inputs have a `CompiledProgram` of their own."""

SMALL_OP = 10e-6
"""Seconds that an operator takes on average, below which CPU workers share a core."""


class _Code(NamedTuple):
    """A loaded program.

    Attributes:
        phased: the phases of each micro-batch.
        lowered: schedule and source.
        names: what the source defines.
        filename: under which `linecache` has it.
        parts: what compiles them prepares these for each size.
    """

    phased: tuple[Phased, ...]
    lowered: Lowered
    names: dict[str, Any]
    filename: str
    parts: tuple[Any, ...] = ()


class TracedPrograms:
    """The programs of one captured model.

    Args:
        stages: traces of its stages.
        options: resolved.
        workers: one per stage.

    Attributes:
        seconds: spent on tracing and generating code.
        generated: how many programs were generated.
    """

    def __init__(
        self, stages: TracedStages, options: Options, workers: tuple[WorkerDevice, ...]
    ) -> None:
        self._stages, self._options, self._workers = stages, options, workers
        self._programs: OrderedDict[ProgramKey, tuple[CompiledProgram, Hashable]] = OrderedDict()
        self._code: dict[Hashable, _Code] = {}
        self._compiler = None if options.mode is None else PartCompiler(options.mode)
        self._grapher = StageGrapher(workers) if options.backend == "cudagraphs" else None
        self.seconds, self.generated = 0.0, 0

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
        phased = {s: self._stages.trace(key, s, progress) for s in dict.fromkeys(key.sizes)}
        code_key = (key.early_backward, *(id(phased[size]) for size in key.sizes))
        if code_key not in self._code:
            self._code[code_key] = self._load(phased, key, progress)
            self.generated += 1
            seconds = perf_counter() - start
            self.seconds += seconds
            logger.info("traced in %.2f s: micro-batches of %s", seconds, key.sizes)
        self._stages.forget_joint_graphs()
        if self._compiler is not None:
            sizes = [{B: size, **dict(key.lengths)} for size in phased]
            self._compiler.prepare(self._code[code_key].parts, sizes, progress)
        self._programs[key] = _program(self._code[code_key], phased, key, self._workers), code_key
        if len(self._programs) > MANY_SHAPES:
            self._programs.popitem(last=False)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What the backend cannot run, and why: it runs eagerly."""
        failed = () if self._compiler is None else self._compiler.failures
        without_graphs = () if self._grapher is None else self._grapher.reasons
        return (*failed, *without_graphs)

    def forget(self, code_key: Hashable) -> None:
        """Free a program's code, and the traces that no other program uses.

        Args:
            code_key: as `program` returned it.
        """
        if self._code.pop(code_key, None) is None:
            return
        for key in [k for k, (_, used) in self._programs.items() if used == code_key]:
            del self._programs[key]
        self._stages.keep_only(p for other in self._code.values() for p in other.phased)

    @property
    def codes(self) -> tuple[Hashable, ...]:
        """The keys of all code that is kept."""
        return tuple(self._code)

    @property
    def is_empty(self) -> bool:
        """Whether no code is left."""
        return not self._code

    def is_traced(self, key: ProgramKey) -> bool:
        """Whether no stage need be traced for a program.

        Args:
            key: of the program.
        """
        return key in self._programs or all(self._stages.find(key, size) for size in set(key.sizes))

    def _load(
        self,
        phased: dict[int, Phased],
        key: ProgramKey,
        progress: Callable[[str], None],
    ) -> _Code:
        lowered = lower_to_code(
            phased,
            key.sizes,
            tuple(w.device for w in self._workers),
            order=self._options.order,
            early_backward=key.early_backward,
            least_queue=queue_capacity,
            parted=self._compiler is not None,
            progress=progress,
        )
        names, filename = load_source(lowered.generated.source)
        compiler = self._compiler
        parts = () if compiler is None else compiler.bind(lowered.generated.parts, names)
        if self._grapher is not None:
            self._grapher.bind(next(iter(phased.values())), names)
        return _Code(tuple(phased[s] for s in key.sizes), lowered, names, filename, parts)


def _is_small(cut: Phased) -> bool:
    """Whether operators are so small that CPU workers share a core; False if sizes are symbolic."""
    return not cut.symbols and mean_op_seconds(cut.stages, CPU_CORE) < SMALL_OP


def _program(
    code: _Code, phased: dict[int, Phased], key: ProgramKey, workers: tuple[WorkerDevice, ...]
) -> CompiledProgram:
    """A program with what it needs for the sizes of one key."""
    generated, devices = code.lowered.generated, [w.device for w in workers]
    sizes = {size: {B: size, **dict(key.lengths)} for size in phased}
    program = Program(
        forward=tuple(code.names[n] for n in generated.forward),
        backward=tuple(code.names[n] for n in generated.backward),
        step=tuple(code.names[n] for n in generated.step),
        drivers=tuple(workers[row[0].stage] for row in code.lowered.scheduled.devices if row),
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
        queues={(q.value, q.to): size for q, size in code.lowered.queues.items()},
        offloaded={
            (size, k): leaving_values(cut, devices, k)
            for size, cut in phased.items()
            for k in range(len(cut.stages))
        },
        least_offloaded=least_offloaded(next(iter(phased.values()))),
        shares_core=all(map(_is_small, phased.values())),
    )
    lowered = code.lowered.with_phases(phased)
    return CompiledProgram(key, program, lowered)
