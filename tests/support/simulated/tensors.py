"""Tensors on simulated devices, and the operators on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .blocks import Block
from .graphs import CaptureFailedError
from .machine import TYPE, Machine
from .streams import Stream

aten = torch.ops.aten
CPU = torch.device("cpu")


class SimulatedTensor(Tensor):
    """A tensor on a simulated device, or in pinned memory of the host.

    Attributes:
        values: a CPU tensor.
        block: the memory, shared by its views.
    """

    values: Tensor
    block: Block

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device, block: Block) -> SimulatedTensor:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
            requires_grad=False,
        )
        made.values, made.block = values, block
        return made  # type: ignore[no-any-return]

    def untyped_storage(self) -> Any:
        return self.values.untyped_storage()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def is_pinned(self, device: Any = None) -> bool:
        return self.device == CPU

    def record_stream(self, stream: Any) -> None:
        with self.block.machine.lock:
            self.block.recorded.add(stream)

    def __repr__(self, **_: Any) -> str:
        return f"SimulatedTensor({self.values}, device={self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        machine = next(
            x.block.machine
            for x in pytree.tree_leaves((args, kwargs))
            if isinstance(x, SimulatedTensor)
        )
        return run(machine, func, args, kwargs or {})


class Simulation(TorchDispatchMode):
    """Lets tensors of the host come to a machine's devices, and factories make tensors there."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(self.machine, func, args, kwargs or {})


def pinned(machine: Machine, values: Tensor) -> SimulatedTensor:
    """A copy of a CPU tensor in pinned memory of the host, which streams copy from directly."""
    return SimulatedTensor(values.clone(), CPU, Block(machine, None, "a pinned tensor"))


def run(machine: Machine, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operator where its tensors are."""
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, SimulatedTensor)]
    named = next((x for x in leaves if isinstance(x, torch.device)), None)
    if not tensors and (named is None or named.type != TYPE):
        return func(*args, **kwargs)
    if func is aten._to_copy.default:
        return _to_copy(machine, args[0], named or args[0].device, kwargs)
    if func is aten.copy_.default and args[0].device != args[1].device:
        plain = {k: v for k, v in kwargs.items() if k == "non_blocking"}
        plain |= {"non_blocking": args[2]} if len(args) > 2 else {}
        moved = _to_copy(machine, args[1], args[0].device, plain)
        return run(machine, func, (args[0], moved), {})
    device = next((x.device for x in tensors if x.device != CPU), named or CPU)
    odd = {x.device for x in leaves if isinstance(x, Tensor) and x.ndim} - {device}
    if odd:
        raise RuntimeError(f"{func}: tensors on {device} and on {', '.join(map(str, odd))}")
    with machine.lock:
        return _run_on(machine, None if device == CPU else device, func, args, kwargs)


def _run_on(
    machine: Machine,
    device: torch.device | None,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run an operator whose tensors are on one device; None: in the host's memory."""
    stream = None if device is None else machine.current_stream(device)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, SimulatedTensor)]
    changed = _changed(func, args, kwargs)
    if stream in machine.capturing:
        return machine.capturing[stream].record(func, args, kwargs, changed)
    if changed or not is_view(func):
        _access(machine, stream, func, tensors, changed)
    plain = [x.values if isinstance(x, SimulatedTensor) else on_cpu(x) for x in leaves]
    plain_args, plain_kwargs = pytree.tree_unflatten(plain, spec)
    with _disable_current_modes():
        found = func(*plain_args, **plain_kwargs)
    blocks = {x.values.untyped_storage()._cdata: x.block for x in tensors}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            if stream is not None and value is not None:  # a number: the host waits for it
                stream.synchronize()
            return value
        same = [x for x in tensors if x.values is value]
        if same:
            return same[0]
        storage = value.untyped_storage()._cdata
        if storage not in blocks:
            if stream is None:
                return value
            block = blocks[storage] = Block(
                machine, stream, str(func), value.untyped_storage().nbytes()
            )
            tick = stream.clock[stream]
            block.access(stream.clock, stream, tick, str(func), True)
            machine.made(block, stream, str(func))
        return SimulatedTensor(value, device or CPU, blocks[storage])

    return pytree.tree_map(wrapped, found)


def _access(
    machine: Machine,
    stream: Stream | None,
    func: Any,
    tensors: list[SimulatedTensor],
    changed: set[int],
) -> None:
    """Queue one operator in a stream, or run it on the host, and check what it reads and writes."""
    name = str(func)
    if stream is None:
        tick, clock = 0, machine.host_knows
    else:
        tick, clock = stream.tick(machine.cost(func, stream.device)), stream.clock
        machine.counts["kernels"] += 1
    written = {id(x.block) for x in tensors if id(x) in changed}
    for block in {id(x.block): x.block for x in tensors}.values():
        block.access(clock, stream, tick, name, id(block) in written)
    machine.launched(stream, name, tensors, written)


def _to_copy(
    machine: Machine, tensor: Tensor, target: torch.device, kwargs: dict[str, Any]
) -> Tensor:
    """Copy a tensor, as ATen's CUDA kernels do: see its `Copy.cu`."""
    blocking = not kwargs.get("non_blocking")
    source = tensor.device
    options = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format", "layout")}
    with machine.lock, _disable_current_modes():
        values = tensor.values if isinstance(tensor, SimulatedTensor) else tensor
        copy = aten._to_copy.default(values, **options)
        inputs = [tensor] if isinstance(tensor, SimulatedTensor) else []
        if source == CPU and target == CPU:
            _access(machine, None, aten._to_copy.default, inputs, set())
            return copy  # type: ignore[no-any-return]
        for device in {source, target} - {CPU}:
            graph = machine.capturing.get(machine.current_stream(device))
            if graph is not None and source != target:
                raise CaptureFailedError(f"a copy from {source} to {target} is captured")
            if graph is not None:
                return graph.record(aten._to_copy.default, (tensor,), options, set())
        machine.counts["copies" if source != target else "casts"] += 1
        on = target if source == CPU else source
        stream, block = machine.current_stream(on), None
        if CPU not in (source, target) and source != target:
            stream.wait_stream(machine.current_stream(target))
        _access(machine, stream, aten._to_copy.default, inputs, set())
        if target != CPU:
            block = Block(
                machine, machine.current_stream(target), f"a copy from {source}", copy.nbytes
            )
        elif not blocking:
            block = Block(machine, None, f"a copy from {source}")
        if block is not None:
            block.access(stream.clock, stream, stream.clock[stream], "the copy", True)
            machine.made(block, stream, "the copy")
        if CPU not in (source, target) and source != target:
            machine.current_stream(target).wait_stream(stream)
        if CPU in (source, target) and blocking:
            stream.synchronize()
        return copy if block is None else SimulatedTensor(copy, target, block)


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """The tensors, by id, that an operator writes to."""
    found: set[int] = set()
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        found |= {id(x) for x in pytree.tree_leaves(value) if isinstance(x, Tensor)}
    return found


def is_view(func: Any) -> bool:
    """Whether an operator reads no memory: its results are views."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None for r in returns)


def on_cpu(value: Any) -> Any:
    return CPU if isinstance(value, torch.device) else value
