"""Compare a pipeline's training step with the model's own, on one batch (`Pipeline.verify`).

Everything that a training step produces is compared: outputs, gradients, buffers. If something
differs, two further comparisons locate it. Each submodule's result is compared with the captured
graph's (an error of capture), and each tensor that a stage sent with the captured graph's (an error
of the pipeline).
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.errors import UnsupportedError, printable
from autopipe.formatting import align_columns
from autopipe.parameters import move
from autopipe.passes._torch import CheckpointFunction
from autopipe.passes.capture import preserve_buffers, restore_values, take_apart
from autopipe.passes.graph import is_random, source_line
from autopipe.passes.loss_seeds import has_loss
from autopipe.runtime.executor import Run
from autopipe.verification.deterministic import MicroBatchNorm, NoRandomness
from autopipe.verification.locate import locate_gradient, locate_value
from autopipe.verification.step_snapshot import Difference, StepSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autopipe.call_signature import CallInputs
    from autopipe.program_cache import ProgramCache

aten = torch.ops.aten

SLACK = {"eager": 1.0, "cudagraphs": 1.0, "inductor": 10.0}
"""By backend: what the tolerance by dtype is multiplied by. Fused kernels round at other places."""


@dataclass(frozen=True)
class Verification:
    """Result of `Pipeline.verify`.

    Attributes:
        differences: one per output, gradient and buffer.
        stage, node: where the first value that differs is computed, if one does; `node` is a name
            in `Pipeline.captured`.
        source: the model's line of `node`.
        notes: how both runs differ from an ordinary step.
        backend: what ran the pipeline's phases: "eager", "inductor" or "cudagraphs".
    """

    differences: tuple[Difference, ...]
    stage: int | None
    node: str | None
    source: str | None
    notes: tuple[str, ...]
    backend: str = "eager"

    @property
    def ok(self) -> bool:
        """Whether everything is equal up to rounding."""
        return all(d.ok for d in self.differences)

    def worst(self, kind: str) -> Difference | None:
        """Return the largest difference of a kind, relative to its scale.

        Args:
            kind: "output", "gradient" or "buffer".

        Returns:
            The difference; None if nothing of this kind was compared.
        """
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
        lines = align_columns([["", "equal", "largest difference", "of", "in"], *rows], left=[1])
        if not self.ok:
            place = f"stage {self.stage}, node {self.node}" if self.node else "no node found"
            source = f" ({self.source})" if self.source else ""
            lines.append(f"first difference: {place}{source}")
        lines += [f"note: {note}" for note in self.notes]
        return printable("\n".join(lines), lines=True)


class ComparedPipeline(NamedTuple):
    """The parts of a pipeline that `compare` uses.

    Attributes:
        model: the user's module.
        programs: its programs.
        run: the pipeline as a function.
        fresh: returns a new pipeline of the same model, without programs, with other options.
    """

    model: nn.Module
    programs: ProgramCache
    run: Callable[..., Any]
    fresh: Callable[..., ComparedPipeline]


def compare(pipe: ComparedPipeline, inputs: CallInputs, tolerance: float | None) -> Verification:
    """Compare a training step of a pipeline with one of the model itself.

    Args:
        pipe: the pipeline.
        inputs: a call.
        tolerance: as for `Pipeline.verify`.

    Raises:
        UnsupportedError: the model draws random numbers that cannot be disabled.
    """
    leaves, spec = inputs.leaves, inputs.spec
    captured = pipe.programs.program_for(inputs, asked=True)[0].split.captured
    notes = []
    backend = pipe.programs.options.backend
    if backend != "eager":
        notes.append(f"the pipeline ran with backend={backend!r}, the model eagerly")
    if pipe.programs.options.starts_early and pipe.model.training and not has_loss(captured):
        notes.append("the model returns no loss: the pipeline ran all forwards first")
        pipe = pipe.fresh(schedule=pipe.programs.options.order.forwards_first())
    with ExitStack() as stack:
        if any(map(is_random, captured.graph_module.graph.nodes)):
            notes.append("randomness was disabled in both runs: dropout drops nothing")
            stack.enter_context(NoRandomness())
            pipe = pipe.fresh()
        compiled, program = pipe.programs.program_for(inputs, asked=True)
        captured, sizes = compiled.split.captured, program.key.sizes
        for node in filter(is_random, captured.graph_module.graph.nodes):
            raise UnsupportedError(
                "the model draws random numbers that verify cannot disable",
                node=node.name,
                source=source_line(node),
                found=str(node.target),
                remedy="verify in evaluation mode, or without that call",
            )
        if any(n.target is aten.batch_norm.default for n in captured.graph_module.graph.nodes):
            notes.append("the model's batch norm normalised by micro-batch, too")
        deferred = pipe.programs.options.batch_norm == "deferred"
        modules: dict[str, Tensor] = {}
        normalising = MicroBatchNorm(sizes, deferred=deferred)
        own_call = mock.patch.object(pipe.model, "_compiled_call_impl", None)  # `install`
        # A reentrant checkpoint does not work with `autograd.grad`: run without checkpoints.
        plain = mock.patch.object(CheckpointFunction, "apply", _checkpointed)
        home = _gather_model(pipe)
        recording = _recording_results(pipe.model, modules)
        with _restored(pipe.model), own_call, normalising, plain, recording:
            own = [_on_device(x, home) for x in leaves]
            expected = StepSnapshot.of(pipe.model, pipe.model, own, spec)
        observed: dict[tuple[str, int], Tensor] = {}
        with _restored(pipe.model):
            found = StepSnapshot.of(
                pipe.model, partial(_run_recording_sends, pipe, observed), leaves, spec
            )
        differences = tuple(expected.against(found, tolerance, SLACK[backend]))
        place = None
        if not all(d.ok for d in differences):
            home = _gather_model(pipe)
            leaves = [_on_device(x, home) for x in leaves]
            place = locate_value(compiled, sizes, leaves, observed, modules)
            place = place or locate_gradient(compiled, [d.name for d in differences if not d.ok])
    if place is None:
        return Verification(differences, None, None, None, tuple(notes), backend)
    stage, node = place
    return Verification(differences, stage, node.name, source_line(node), tuple(notes), backend)


def _gather_model(pipe: ComparedPipeline) -> torch.device:
    """Move the model's tensors to one device, unless they share one, and return it.

    (The pipeline moves them back to their stages in its next call.)
    """
    tensors = [*pipe.model.parameters(), *pipe.model.buffers()]
    devices = {t.device for t in tensors}
    if len(devices) == 1:
        return next(iter(devices))
    home = pipe.programs.options.devices[0]
    for tensor in tensors:
        move(tensor, home)
    return home


def _on_device(leaf: Any, device: torch.device) -> Any:
    """Copy an input to the model's device, as a leaf of autograd."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().to(device).requires_grad_(leaf.requires_grad)


def _checkpointed(run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    """Run a checkpointed function without checkpointing."""
    return run(*args)


def _run_recording_sends(
    pipe: ComparedPipeline, observed: dict[tuple[str, int], Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Run the pipeline and record what its stages send."""
    send = Run.send

    def recording(run: Run, what: str, source: int, to: int, m: int, tensor: Tensor) -> None:
        observed.setdefault((what, m), tensor.detach())
        send(run, what, source, to, m, tensor)

    with mock.patch.object(Run, "send", recording):
        return pipe.run(*args, **kwargs)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """On exit, restore the model's buffers (objects and values) and the random state."""
    before = [(b, b.clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng(), preserve_buffers(model):
            yield
    finally:
        restore_values(before)


@contextmanager
def _recording_results(model: nn.Module, results: dict[str, Tensor]) -> Iterator[None]:
    """Record the (first) tensor that each submodule returns, if it is called once."""
    several: set[str] = set()

    def hook(path: str, result: Any) -> None:
        tensor = next(
            (x for x in pytree.tree_leaves(take_apart(result)) if isinstance(x, Tensor)), None
        )
        if path in results or path in several or tensor is None:
            several.add(path)
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
