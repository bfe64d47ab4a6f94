"""Random calls as functions of (seed, call, micro-batch), or of (seed, call) where all samples
share what is drawn.

A draw seeds a generator from its key and uses it once. So a run draws the same numbers whatever
the number of stages, the schedule or the thread, and rematerialization repeats what the forward
drew. The step's seed is taken from torch's default generator, which `torch.manual_seed` governs.

(Seeding costs about a microsecond. `torch.func`'s stateless Philox keys have no CPU kernels.)
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_default_generator_lock = threading.Lock()


def step_seed() -> int:
    """A seed for one step, drawn from torch's default CPU generator."""
    return int(torch.randint(2**62, ()).item())


def key(*parts: int) -> int:
    """Mix integers into 64 bits (SplitMix64's finalizer, once per part)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


class Kit:
    """What the runtime lends to a stage's code for one micro-batch.

    Args:
        seed: of the step.
        draws: for each of the stage's draws, the call that makes it, which of its draws it is, and
            whether all micro-batches share it: each then draws what micro-batch 0 does.
        microbatch: index of the micro-batch.
        add: takes the gradient of the stage's i-th parameter: ``(i, gradient)``.
    """

    __slots__ = ("_add", "_draws", "_microbatch", "_seed")

    def __init__(
        self,
        seed: int,
        draws: Sequence[tuple[int, int, bool]],
        microbatch: int,
        add: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self._seed, self._draws, self._microbatch = seed, draws, microbatch
        self._add = add

    def accumulate(self, index: int, gradient: Tensor) -> None:
        """Add to the gradient of the stage's parameter `index`, as soon as the gradient is made."""
        assert self._add is not None, "only a backward makes gradients"
        self._add(index, gradient)

    def draw(self, index: int, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the random operator `op` under the key of the stage's draw `index`."""
        device = _device(op, args, kwargs)
        call, nth, shared = self._draws[index]
        seed = key(self._seed, call, nth, 0 if shared else self._microbatch)
        overload = _with_generator(op)
        if overload is not None:
            generator = _generator(device)
            generator.manual_seed(seed)
            return overload(*args, **kwargs, generator=generator)
        with _default_generator_lock:  # the operator knows only the process's own generator
            default = _default_generator(device)
            state = default.get_state()
            try:
                default.manual_seed(seed)
                return op(*args, **kwargs)
            finally:
                default.set_state(state)

    @staticmethod
    def recording(op: Any, *args: Any) -> Any:
        """Call an operator that returns what its backward needs only while gradients are on."""
        with torch.enable_grad():
            return op(*args)

    @staticmethod
    def settled(tensor: Tensor) -> Tensor:
        """The tensor, dense in the memory format that its strides suggest.

        The rule is ATen's `suggest_memory_format` for four dimensions.
        """
        strides, sizes = tensor.stride(), tensor.shape
        least, channels_last = 0, strides[1] != 0
        for d in (1, 3, 2, 0):
            if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
                channels_last = False
                break
            least = strides[d] * max(sizes[d], 1)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return tensor.contiguous(memory_format=layout)


def _device(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.device:
    device = kwargs.get("device")
    if device is None:
        device = next((a.device for a in args if isinstance(a, torch.Tensor)), None)
    return torch.device(device or "cpu")


@functools.cache
def _with_generator(op: Any) -> Any:
    """The overload of `op` that takes a generator: itself, or the one that differs in that only."""
    arguments = [a.name for a in op._schema.arguments]
    if "generator" in arguments:
        return op
    packet = op.overloadpacket
    for name in packet.overloads():
        other = getattr(packet, name)
        names = [a.name for a in other._schema.arguments]
        if "generator" in names and [n for n in names if n != "generator"] == arguments:
            return other
    return None


class _Generators(threading.local):
    """One generator per device, of this thread's own."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, torch.Generator] = {}


_generators = _Generators()


def _generator(device: torch.device) -> torch.Generator:
    known = _generators.by_device
    if device not in known:
        known[device] = torch.Generator(device)
    return known[device]


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
