"""Results of micro-batches put together, step by step, without running a pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

from autopipe import results
from autopipe.errors import OptionError
from autopipe.passes.ir import MEAN, SAME, SUM, B, Concatenate, Input, InputKind, Output, TensorSpec
from tests.support.programs import captured_of

SIZES = (3, 2, 2)
CPU = torch.device("cpu")


def output(name: str, combine: Any, *shape: Any) -> Output:
    return Output(TensorSpec(name, tuple(map(sympy.sympify, shape)), torch.float32), combine)


OUTPUTS = [
    output("y", Concatenate(0), B, 4),
    output("total", SUM),
    output("loss", MEAN),
    output("table", SAME, 4),
]


def parts() -> dict[tuple[str, int], Tensor]:
    torch.manual_seed(0)
    table = torch.randn(4)
    found: dict[tuple[str, int], Tensor] = {}
    for m, size in enumerate(SIZES):
        found["y", m] = torch.randn(size, 4)
        found["total", m], found["loss", m] = torch.randn(()), torch.randn(())
        found["table", m] = table
    return found


def test_outputs_are_gathered_and_their_parts_forgotten() -> None:
    known = parts()
    left = known | {("grad x", 0): torch.ones(1)}
    gathered = results.gather_outputs(OUTPUTS, left, SIZES)
    assert list(left) == [("grad x", 0)]
    y, total, loss, table = gathered.values
    assert torch.equal(y, torch.cat([known["y", m] for m in range(3)]))
    assert torch.equal(total, known["total", 0] + known["total", 1] + known["total", 2])
    weighted = [known["loss", m] * (n / 7) for m, n in enumerate(SIZES)]
    assert torch.equal(loss, weighted[0] + weighted[1] + weighted[2])
    assert torch.equal(table, known["table", 0])


def test_gradients_are_shared_where_there_are_any() -> None:
    saved = results.gather_outputs(OUTPUTS, parts(), SIZES).saved
    y, loss = torch.randn(7, 4), torch.randn(())
    shared = results.share_gradients(OUTPUTS, [y, None, loss, None], saved, SIZES)
    assert list(shared) == ["y", "loss"]
    assert [p.shape[0] for p in shared["y"]] == list(SIZES)
    assert torch.equal(torch.cat(shared["y"]), y)
    assert [float(p) for p in shared["loss"]] == [float(loss * (n / 7)) for n in SIZES]


@pytest.mark.parametrize("batch_dim", [None, 1])
def test_gradients_of_an_input(batch_dim: int | None) -> None:
    spec = TensorSpec("x", (sympy.Integer(4), B), torch.float32)
    item = Input(spec, InputKind.INPUT, index=0, batch_dim=batch_dim)
    assert results.input_gradient(item, {}, SIZES) is None
    widths = SIZES if batch_dim == 1 else (7, 7, 7)
    found = {("grad x", m): torch.randn(4, n) for m, n in enumerate(widths)}
    gradient = results.input_gradient(item, found, SIZES)
    a, b, c = found.values()
    assert gradient is not None
    assert torch.equal(gradient, a + b + c if batch_dim is None else torch.cat([a, b, c], 1))


def test_results_are_where_the_inputs_are() -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert results.output_device(CPU, [first]) == CPU
    assert results.output_device(second, [CPU, first]) == first
    assert results.output_device(second, [CPU]) == second


class Everything(nn.Module):
    """Returns one leaf of each kind, and writes to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("seen", torch.tensor(0.0))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = x * self.scale
        self.seen += y.detach().sum()
        return {
            "value": y,
            "epilogue": y.sum().exp(),
            "input": x,
            "parameter": self.scale,
            "size": x.shape[0],
            "constant": "text",
        }


def test_the_result_has_the_models_structure_and_buffers_are_written() -> None:
    model, x = Everything(), torch.randn(7, 4) / 8
    captured = captured_of(model, x, batch_norm="deferred")
    assert captured.epilogue is not None
    assert captured.updates
    model.seen.fill_(1.0)
    known = {
        (o.name, m): value
        for m, part in enumerate(x.split(SIZES))
        for o, value in zip(
            captured.outputs, captured.graph_module(*arguments(captured, model, part)), strict=True
        )
    }
    gathered = results.gather_outputs(captured.outputs, known, SIZES).values
    values = results.run_epilogue(captured, gathered, {B: 7}, model.get_buffer)
    assert model.seen == 1.0, "the epilogue reads the buffer and does not write to it"
    found = results.finish(captured, model, gathered, [x], {B: 7})
    seen = dict(captured.updates)["seen"]
    assert torch.equal(model.seen, values[seen])
    torch.testing.assert_close(model.seen, 1.0 + (2 * x).sum())
    torch.testing.assert_close(found["value"], 2 * x)
    torch.testing.assert_close(found["epilogue"], (2 * x).sum().exp())
    assert found["input"] is x
    assert found["parameter"] is model.scale
    assert (found["size"], found["constant"]) == (7, "text")


def test_buffers_may_be_on_another_device_than_the_outputs() -> None:
    """Outputs are on the last stage's device; the meta device mixes with no other."""
    model, x = Everything(), torch.randn(7, 4)
    captured = captured_of(model, x, batch_norm="deferred")
    gathered = captured.graph_module(*arguments(captured, model, x))
    found = results.run_epilogue(
        captured, [g.to("meta") for g in gathered], {B: 7}, model.get_buffer
    )
    seen = found[dict(captured.updates)["seen"]]
    assert (seen.is_meta, seen.shape) == (True, model.seen.shape)
    assert model.seen.device == CPU


def arguments(captured: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    held = dict(model.named_parameters()) | dict(model.named_buffers()) | captured.constants
    return [x if i.kind is InputKind.INPUT else held[i.target] for i in captured.inputs]


def test_without_an_epilogue_the_outputs_are_the_values() -> None:
    captured = captured_of(nn.Linear(4, 4), torch.randn(7, 4))
    gathered = (torch.randn(7, 4),)
    assert results.run_epilogue(captured, gathered, {B: 7}, {}.__getitem__) is gathered


# ------------------------------------------------------------------------------- the loss of a step

ONE = torch.tensor(3.0)


class Holding:
    """A result with a loss among its attributes."""

    loss = ONE


@pytest.mark.parametrize("output", [ONE, {"loss": ONE}, Holding()], ids=["itself", "item", "named"])
def test_the_loss_is_found_in_the_result(output: Any) -> None:
    assert results.loss_of(output, None, None) is ONE
    assert results.loss_of(output, 2, lambda found, target: ONE * target) == 6


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (torch.ones(2), r"a Tensor of shape \(2,\)"),
        ({"logits": ONE}, "a result of 'logits'"),
        ({"loss": None, "logits": ONE}, "a result of 'loss', 'logits'"),
        (3.0, r"3\.0"),
    ],
)
def test_a_result_without_a_loss(output: Any, found: str) -> None:
    with pytest.raises(OptionError, match=found) as caught:
        results.loss_of(output, None, None)
    assert "labels" in str(caught.value.remedy)


def test_a_loss_function_without_its_target() -> None:
    loss_fn = nn.functional.mse_loss
    with pytest.raises(OptionError, match="without a target") as caught:
        results.loss_of(torch.ones(2), None, loss_fn)
    assert type(caught.value.__cause__) is AttributeError
    with pytest.raises(RuntimeError, match="size of tensor"):  # what the function says of a target
        results.loss_of(torch.ones(2), torch.ones(3), loss_fn)
