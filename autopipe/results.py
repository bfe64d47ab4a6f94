"""Combine the micro-batches' values: the model's result, written buffers, input gradients.

After the forward, in this order:

    gather_outputs   M values per output → one
    run_epilogue     the outputs' values → the final values (once a step, on the whole batch)
    write_buffers    final values → the model's buffers
    fill_result      final values → the structure that the model returns

For the backward: `share_gradients`, the reverse of `gather_outputs`, and `input_gradient`.
`loss_of` finds the loss in a result, for `Pipeline.step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopipe.errors import OptionError, shown
from autopipe.passes.capture import missing_target
from autopipe.passes.ir import SUM, B, Concatenate, InputKind

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

    from torch import nn

    from autopipe.passes.ir import Captured, Combine, Input, Output, Sizes


@dataclass(frozen=True, eq=False)
class GatheredOutputs:
    """One value per output, for the whole batch.

    Attributes:
        values: in the order of `Captured.outputs`.
        saved: for each output what `share_gradients` needs.
    """

    values: tuple[Tensor, ...]
    saved: tuple[Any, ...]


def gather_outputs(
    outputs: Sequence[Output],
    parts: MutableMapping[tuple[str, int], Tensor],
    sizes: Sequence[int],
) -> GatheredOutputs:
    """Combine the micro-batches' values of each output.

    Args:
        outputs: of the captured graph.
        parts: (output, micro-batch) → value; the entries are removed.
        sizes: samples per micro-batch.
    """
    values, saved = [], []
    for output in outputs:
        own = [parts.pop((output.name, m)) for m in range(len(sizes))]
        saved.append(output.combine.saved_for_share(own))
        values.append(output.combine.gather(own, sizes))
    return GatheredOutputs(tuple(values), tuple(saved))


def share_gradients(
    outputs: Sequence[Output],
    gradients: Sequence[Tensor | None],
    saved: Sequence[Any],
    sizes: Sequence[int],
) -> dict[str, list[Tensor]]:
    """Share the gradients of gathered outputs among the micro-batches.

    Args:
        outputs: of the captured graph.
        gradients: one per output; None if the output got none.
        saved: `GatheredOutputs.saved`.
        sizes: samples per micro-batch.

    Returns:
        For each output with a gradient, the gradients of the M micro-batches' values.
    """
    return {
        output.name: output.combine.share(gradient, kept, sizes)
        for output, gradient, kept in zip(outputs, gradients, saved, strict=True)
        if gradient is not None
    }


def input_gradient(
    item: Input,
    parts: Mapping[tuple[str, int], Tensor],
    sizes: Sequence[int],
) -> Tensor | None:
    """Combine the micro-batches' gradients of one input of the call.

    Args:
        item: the input.
        parts: ("grad NAME", micro-batch) → gradient; one that is missing is zero.
        sizes: samples per micro-batch.

    Returns:
        The gradient, or None if no micro-batch has one.
    """
    own = [parts.get((f"grad {item.name}", m)) for m in range(len(sizes))]
    here = [p for p in own if p is not None]
    combine: Combine = SUM if item.batch_dim is None else Concatenate(item.batch_dim)
    return combine.gather(here, sizes) if here else None


def output_device(last: torch.device, inputs: Sequence[torch.device]) -> torch.device:
    """Choose the device of results: the inputs' accelerator, as the model itself would.

    Args:
        last: the last stage's device.
        inputs: the devices of the call's tensors.

    Returns:
        The first input's device of the type of `last`; `last` if no input is on such a device.
    """
    return next((d for d in inputs if d.type == last.type), last)


def destinations(
    captured: Captured, inputs: Sequence[Input], leaves: Sequence[Any], last: torch.device
) -> dict[str, torch.device]:
    """Where the caller wants the results of workers.

    Args:
        captured: the model's graph.
        inputs: the tensors of the call.
        leaves: the call's flattened inputs.
        last: the last stage's device.

    Returns:
        For each output, and each gradient of an input ("grad NAME"), its device.
    """
    devices = {f"grad {i.name}": leaves[i.index].device for i in inputs}
    device = output_device(last, [*devices.values()])
    return devices | {o.name: device for o in captured.outputs}


def example_outputs(
    captured: Captured, sizes: Sizes, device: torch.device | str
) -> dict[str, Tensor]:
    """Tensors like the outputs of the whole batch, by name; all are 1.

    Args:
        captured: the model's graph.
        sizes: of the whole batch.
        device: of the tensors.
    """
    found = {}
    for output in captured.outputs:
        shape = [int(n.xreplace(sizes)) for n in output.spec.full_shape]
        found[output.name] = torch.ones((), dtype=output.spec.dtype, device=device).expand(shape)
    return found


def run_epilogue(
    captured: Captured, gathered: Sequence[Tensor], sizes: Sizes, buffer: Callable[[str], Tensor]
) -> Sequence[Tensor]:
    """Compute the final values from the gathered outputs.

    Args:
        captured: the model's graph, with its epilogue.
        gathered: one value per output.
        sizes: of the whole batch.
        buffer: returns a buffer of the model by its qualified name; it may be on any device.
    """
    epilogue = captured.epilogue
    if epilogue is None:
        return gathered
    here = next((v.device for v in gathered), None)
    known: dict[str, Any] = {o.name: v for o, v in zip(captured.outputs, gathered, strict=True)}
    known |= {"batch_size" if s == B else str(s): n for s, n in sizes.items()}
    targets = {i.name: i.target for i in captured.inputs if i.kind is InputKind.BUFFER}
    wanted = [str(n.target) for n in epilogue.graph.nodes if n.op == "placeholder"]
    arguments = [known[n] if n in known else buffer(targets[n]).to(here) for n in wanted]
    if any("autocast" in n.meta for n in epilogue.graph.nodes):
        found: Sequence[Tensor] = _AutocastInterpreter(epilogue).run(*arguments)
        return found
    values: Sequence[Tensor] = epilogue.forward(*arguments)  # no module of the user's: no hooks
    return values


class _AutocastInterpreter(fx.Interpreter):
    """Run each op in the autocast region that it was captured in."""

    def run_node(self, n: fx.Node) -> Any:
        if "autocast" not in n.meta:
            return super().run_node(n)
        _, dtype, enabled, _ = n.meta["autocast"]
        tensors = [self.env[a] for a in n.all_input_nodes]
        device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            return super().run_node(n)


def write_buffers(captured: Captured, model: nn.Module, values: Sequence[Tensor]) -> None:
    """Write the model's buffers from the final `values`, once a step."""
    with torch.no_grad():
        for target, index in captured.updates:
            model.get_buffer(target).copy_(values[index])


def fill_result(
    captured: Captured,
    model: nn.Module,
    values: Sequence[Tensor],
    leaves: Sequence[Any],
    sizes: Sizes,
) -> Any:
    """Fill the structure that the model returns.

    Args:
        captured: the model's graph.
        model: whose parameters may be results themselves.
        values: the final values.
        leaves: the call's flattened inputs, which may be results themselves.
        sizes: of the whole batch.
    """
    kinds: dict[str, Callable[[Any], Any]] = {
        "value": lambda i: values[i],
        "input": lambda i: leaves[i],
        "parameter": model.get_parameter,
        "size": lambda number: number(sizes),
        "constant": lambda x: x,
    }
    filled = [kinds[leaf.kind](leaf.value) for leaf in captured.leaves]
    return pytree.tree_unflatten(filled, captured.out_spec)


def finish(
    captured: Captured,
    model: nn.Module,
    gathered: Sequence[Tensor],
    leaves: Sequence[Any],
    sizes: Sizes,
) -> Any:
    """Turn the gathered outputs into what the model returns, and write its buffers.

    Args:
        captured: the model's graph.
        model: the user's module.
        gathered: one value per output.
        leaves: the call's flattened inputs.
        sizes: of the whole batch.
    """
    values = run_epilogue(captured, gathered, sizes, model.get_buffer)
    write_buffers(captured, model, values)
    return fill_result(captured, model, values, leaves, sizes)


def loss_of(output: Any, target: Any, loss_fn: Callable[..., Tensor] | None) -> Tensor:
    """The loss of a step: one number.

    Args:
        output: the model's.
        target: the second argument of `loss_fn`.
        loss_fn: the user's; None: the loss is ``output.loss``, ``output["loss"]`` or the output.

    Raises:
        OptionError: there is none.
    """
    loss: Any
    if loss_fn is not None:
        try:
            loss = loss_fn(output, target)
        except Exception as error:
            if target is not None:
                raise
            raise missing_target(error) from error
    elif isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = getattr(output, "loss", output)
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    found = f"a Tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else shown(loss)
    if isinstance(output, Mapping) and loss is None:
        found = f"a result of {', '.join(map(shown, output))}"
    raise OptionError(
        "step needs a loss",
        expected="one number",
        found=found,
        remedy="pass loss_fn to autopipe.compile and the target to step(..., target=y), or give the"
        " model what it computes its loss from (labels=...)",
    )
