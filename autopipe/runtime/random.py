"""Random ops as functions of (step seed, op, micro-batch), or of (step seed, op) if all samples
share the random numbers.

Each random op seeds a generator with its key and uses it once. So a step draws the same numbers for
any number of stages, any schedule and any thread, and rematerialization repeats the numbers of the
forward. The step's seed comes from torch's default generator, which `torch.manual_seed` sets.

(Seeding costs about a microsecond. `torch.func`'s stateless Philox keys have no CPU kernels.)
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .backends import backend_of
from .untagged_draws import call_watched

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

default_generator_lock = threading.Lock()
"""Held by whoever uses a default generator for a draw."""


def step_seed() -> int:
    """Draw the seed of one step from torch's default CPU generator."""
    return int(torch.randint(2**62, ()).item())


def derive_seed(*parts: int) -> int:
    """Hash integers to 64 bits: SplitMix64's finalizer (Steele, Lea, Flood 2014), once per part.

    Args:
        parts: such as the step's seed, an op and a micro-batch.

    Returns:
        A seed, at least 0 and below 2**64.
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


class MicroBatchContext:
    """`ctx` in generated code: what a stage needs for one micro-batch besides tensors.

    Args:
        seed: of the step.
        draws: for each of the stage's random ops (captured op, which of that op's draws it is,
            whether all micro-batches share it: then each draws the numbers of micro-batch 0).
        microbatch: index of the micro-batch.
        add: called with ``(i, gradient)`` for the stage's i-th parameter.
        sizes: the values of the symbolic sizes in the stage's code, in its order.
    """

    __slots__ = ("_add", "_draws", "_microbatch", "_seed", "sizes")

    def __init__(
        self,
        seed: int,
        draws: Sequence[tuple[int, int, bool]],
        microbatch: int,
        add: Callable[[int, Tensor], None] | None = None,
        sizes: tuple[int, ...] = (),
    ) -> None:
        self._seed, self._draws, self._microbatch = seed, draws, microbatch
        self._add = add
        self.sizes = sizes

    def accumulate(self, index: int, gradient: Tensor) -> None:
        """Add to the gradient of the stage's parameter `index`, as soon as it is computed."""
        assert self._add is not None, "only a backward computes gradients"
        self._add(index, gradient)

    def seed(self, index: int) -> int:
        """The seed of the stage's draw `index`: a position in `draws`."""
        call, nth, shared = self._draws[index]
        return derive_seed(self._seed, call, nth, 0 if shared else self._microbatch)

    def draw(self, index: int, op: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a random op with the seed of the stage's draw `index`.

        Args:
            index: position in `draws`.
            op: an operator of torch.
            args, kwargs: its arguments; a generator among them is None.

        Returns:
            What the op returns. The default generators do not change.
        """
        device, seed = _device(args, kwargs), self.seed(index)
        keyed = keyed_call(op)
        if keyed is not None:
            generator = _generator(device)
            generator.manual_seed(seed)
            return keyed(generator, args, kwargs)
        with default_generator_lock:  # the op can use the process's default generator only
            default = backend_of(device).default_generator(device)
            state = default.get_state()
            try:
                default.manual_seed(seed)
                return op(*args, **kwargs)
            finally:
                default.set_state(state)

    @staticmethod
    def watched(op: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call an operator that might draw random numbers although it has no tag that says so.

        Raises:
            UnsupportedError: it does.
        """
        device = _device(args, kwargs)
        return call_watched(op, device, default_generator_lock, args, kwargs)

    @staticmethod
    def with_grad(op: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call an op that returns what its backward needs only while gradients are enabled."""
        with torch.enable_grad():
            return op(*args, **kwargs)

    @staticmethod
    def in_suggested_format(tensor: Tensor) -> Tensor:
        """Make a tensor dense in the memory format that its strides suggest.

        The rule is ATen's `suggest_memory_format` for four dimensions (N, C, H, W).
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


def _device(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.device:
    """The device on which an op draws: its argument that is one, else that of its first tensor.

    (An argument that is called `device` may be something else in an operator of another library.)
    """
    values = (*args, *kwargs.values())
    for value in values:
        if isinstance(value, torch.device):
            return value
    for value in values:
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor):
                return item.device
    return torch.device("cpu")


@dataclass(frozen=True, slots=True)
class KeyedCall:
    """How an op is called with a generator.

    Attributes:
        overload: the operator to call.
        name: of its generator argument.
        position: of that argument.
        given: how many generators the op's own arguments have at that position: 1 if `overload` is
            the op itself, else 0.
    """

    overload: Any
    name: str
    position: int
    given: int

    def __call__(self, generator: torch.Generator, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call the operator; `args` and `kwargs` are as for the op itself."""
        at = self.position
        if len(args) > at:
            return self.overload(*args[:at], generator, *args[at + self.given :], **kwargs)
        return self.overload(*args, **(kwargs | {self.name: generator}))


@functools.cache
def keyed_call(op: Any) -> KeyedCall | None:
    """How `op` is called with a generator, or None if that is impossible.

    The operator is `op` itself, or an overload whose other arguments are the same.
    """
    own = _argument_types(op)
    packet = op.overloadpacket
    for overload in (op, *(getattr(packet, name) for name in packet.overloads())):
        arguments = _argument_types(overload)
        at = next((i for i, (_, type) in enumerate(arguments) if "Generator" in type), None)
        if at is None:
            continue
        if overload is op or arguments[:at] + arguments[at + 1 :] == own:
            return KeyedCall(overload, arguments[at][0], at, int(overload is op))
    return None


def _argument_types(op: Any) -> list[tuple[str, str]]:
    """Name and type of each argument of an operator."""
    return [(a.name, str(a.type)) for a in op._schema.arguments]


class _Generators(threading.local):
    """One generator per device for the current thread."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, torch.Generator] = {}


_generators = _Generators()


def _generator(device: torch.device) -> torch.Generator:
    """The current thread's generator for a device."""
    cache = _generators.by_device
    if device not in cache:
        cache[device] = backend_of(device).new_generator(device)
    return cache[device]
