"""`TracedStages`: the stages of one captured model, cut into phases, for each micro-batch size.

A trace with symbolic sizes serves all sizes that satisfy its conditions, but takes some times as
long as one with numbers. So sizes are symbolic if the capture has lengths, or from the third
micro-batch size on. Where torch cannot trace with symbolic sizes, or fixes them, stages are traced
once for each shape.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import sympy

from autopipe.errors import InputError, describe
from autopipe.passes.driver import phases_by_size
from autopipe.passes.graph import warn_at_user_line
from autopipe.passes.ir import B
from autopipe.passes.phases import PhaseRequest, TraceCache
from autopipe.tensor_meta import state_metadata, symbolic_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from torch import Tensor

    from autopipe.compiled_program import ProgramKey
    from autopipe.options import Options
    from autopipe.passes.ir import Input, Phased, Sizes, Split
    from autopipe.passes.phases import TensorMeta
    from autopipe.runtime.transfer import WorkerDevice

logger = logging.getLogger("autopipe")

STATIC_SIZES = 2
"""As many micro-batch sizes are traced with numbers before sizes become symbolic."""

FIXED_TRACES = 2
"""After as many traces in which torch fixed a symbolic size, traces are for one shape each."""


class TracedStages:
    """The phases of one captured model's stages.

    Args:
        split: the stages.
        options: resolved.
        workers: one per stage.
        traces: traces of these stages so far.
        tensor: returns the tensor of a placeholder.
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
        self._static: dict[Hashable, Phased] = {}
        self._symbolic: dict[Hashable, list[Phased]] = {}
        self._sizes_traced: dict[Hashable, set[int]] = {}  # with numbers, by modes
        self._fixed: dict[Hashable, int] = {}  # how often torch fixed a symbolic size, by modes
        self._said = False

    def find(self, key: ProgramKey, size: int) -> Phased | None:
        """Return the phases of one micro-batch size, if they are traced.

        Args:
            key: of the program.
            size: samples in the micro-batch.
        """
        found = self._static.get(_exact(key, size))
        metadata = None if found is not None else self._with_symbols(key, size)
        if metadata is None:
            return found
        sizes: Sizes = {B: size, **dict(key.lengths)}
        known = self._symbolic.get((key.modes, tuple(metadata.items())), ())
        return next((p for p in known if p.holds_for(sizes)), None)

    def trace(self, key: ProgramKey, size: int, progress: Callable[[str], None]) -> Phased:
        """Return the phases of one micro-batch size; trace the stages if needed.

        Args:
            key: of the program.
            size: samples in the micro-batch.
            progress: called with a text for each step.

        Raises:
            InputError: a batch norm would see a single value per channel.
        """
        found = self.find(key, size)
        if found is not None:
            return found
        metadata = self._with_symbols(key, size)
        if metadata is not None:
            found = self._traced_symbolically(key, size, metadata, progress)
            if found is not None:
                pattern: Hashable = (key.modes, tuple(metadata.items()))
                self._symbolic.setdefault(pattern, []).append(found)
                return found
        request = self._request(key, size, key.metadata(size))
        found = phases_by_size(request, self._traces, progress)[size]
        self._static[_exact(key, size)] = found
        self._sizes_traced.setdefault(key.modes, set()).add(size)
        return found

    def forget_joint_graphs(self) -> None:
        """Free the graphs of which the stages of all programs are cut."""
        self._traces.joints.clear()

    def keep_only(self, programs: Iterable[Phased]) -> None:
        """Free the traces that no program uses.

        Args:
            programs: what the programs that are left consist of.
        """
        left = list(programs)
        used = set(map(id, left))
        self._static = {k: p for k, p in self._static.items() if id(p) in used}
        symbolic = {k: [p for p in ps if id(p) in used] for k, ps in self._symbolic.items()}
        self._symbolic = {k: ps for k, ps in symbolic.items() if ps}
        self._traces = TraceCache(stages=self._traces.restricted_to(left).stages)

    def _with_symbols(self, key: ProgramKey, size: int) -> dict[str, TensorMeta] | None:
        """The inputs of a trace with symbolic sizes; None if it has numbers only."""
        sizes: Sizes = {B: size, **dict(key.lengths)}
        symbols = self._symbols(key, sizes)
        if not symbols:
            return None
        return symbolic_metadata(self._split.captured, key.metadata(size), sizes, symbols)

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
        if any(_fixes_a_size(c) for c in found.conditions):
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
            self._options.exact,
        )


def _exact(key: ProgramKey, size: int) -> Hashable:
    return key.modes, size, tuple(key.metadata(size).items())


def _fixes_a_size(condition: sympy.Basic) -> bool:
    """Whether a condition holds for one size only; for even sizes, say, it holds for many."""
    return isinstance(condition, sympy.Eq) and any(side.is_number for side in condition.args)
