"""Capture: what the graph holds, and what is refused instead of captured wrongly.

Where a model can be captured, results must equal those of eager torch on the whole batch; see
`tests.support.agreement`. Covers capture/tracing.py (names, examples), capture/explain.py and
capture/exporting.py (what is refused), capture/normalize.py, capture/inlining.py (placeholders and
ops) and batch_dims.py.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from autopipe.errors import AutopipeError, CaptureError, InputError
from autopipe.passes.capture.explain import explain
from autopipe.passes.capture.patches import gather_on_one_device
from autopipe.passes.graph.fingerprints import fingerprint
from autopipe.passes.ir.combine import Concatenate
from autopipe.passes.ir.values import InputKind
from tests.support.agreement import assert_agrees, assert_close, pipelined
from tests.support.capturing import BATCH, D, Model, Pair, batch
from tests.support.models import Tied
from tests.support.programs import captured_of, node, user_line

pytestmark = pytest.mark.usefixtures("double")


def parameters(model: nn.Module, *args: Any) -> list[str]:
    return [i.target for i in captured_of(model, *args).inputs if i.kind is InputKind.PARAMETER]


# ------------------------------------------------------------------------------- the state


def test_a_tied_parameter_is_one_placeholder() -> None:
    model = Tied()
    captured = captured_of(model, torch.randint(0, 19, (4, 5)))
    tied = [
        i
        for i in captured.inputs
        if i.kind is InputKind.PARAMETER and model.get_parameter(i.target) is model.head.weight
    ]
    assert len(tied) == 1
    names = [i.name for i in captured.inputs if i.kind is InputKind.PARAMETER]
    assert len(names) == len(set(names)) == len(list(model.parameters()))
    placeholder = node(captured.graph_module.graph, tied[0].name)
    assert len(placeholder.users) == 1 + 3 + 1  # the embedding, again in each layer, the head


def test_a_parameter_that_is_not_used_is_no_placeholder() -> None:
    model = Model(lambda s, x: x * 2)
    assert parameters(model, batch()) == ["first.weight", "first.bias"]


def test_buffers_and_constants_are_placeholders() -> None:
    model = Model(lambda s, x: s.last(x) * torch.arange(D) + s.shift)
    model.register_buffer("shift", torch.rand(D))
    captured = captured_of(model, batch())
    kinds = collections.Counter(i.kind for i in captured.inputs)
    assert kinds[InputKind.BUFFER] == 1
    assert kinds[InputKind.PARAMETER] == 4
    assert all(
        i.target in captured.constants for i in captured.inputs if i.kind is InputKind.CONSTANT
    )
    assert_agrees(pipelined(model), batch())


def test_names_that_collide_once_dots_are_underscores() -> None:
    model = Model(lambda s, x: s.last(x) * s.a.b + s.a_b)
    model.a = nn.Module()
    model.a.b = nn.Parameter(torch.rand(D))
    model.a_b = nn.Parameter(torch.rand(D))
    assert_agrees(pipelined(model), batch())


# ------------------------------------------------------------------------------- the call's tensors


def test_one_tensor_passed_twice_stays_two_inputs() -> None:
    pipe = pipelined(Model(lambda s, x, y: s.last(x) * y))
    same = batch(grad=True)
    assert_agrees(pipe, same, same)
    assert [i.index for i in pipe.captured.inputs if i.kind is InputKind.INPUT] == [0, 1]
    assert_agrees(pipe, batch(grad=True), batch(grad=True))


def test_a_batch_of_one_as_example_fixes_nothing() -> None:
    pipe = pipelined(Model(lambda s, x, y: s.last(x) * y))
    first = pipe(batch(1), batch(1))
    assert first.shape == (1, D)
    for size in (7, 2, 1):
        assert_agrees(pipe, batch(size, grad=True), batch(size))


@pytest.mark.parametrize("in_dims", [(0, None), {"scale": None}])
def test_an_input_without_batch_reaches_every_micro_batch(in_dims: Any) -> None:
    class Scaled(Model):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return self.last(torch.tanh(self.first(x)) * scale)

    pipe = pipelined(Scaled(lambda: None), in_dims=in_dims)
    assert_agrees(pipe, batch(grad=True), torch.randn(D).requires_grad_())


def test_a_tensor_without_dimensions_is_not_batched() -> None:
    pipe = pipelined(Model(lambda s, x, scale: s.last(x) * scale))
    assert_agrees(pipe, batch(), torch.tensor(0.3).requires_grad_())


def test_the_batch_may_be_another_dimension() -> None:
    class Sequence(Model):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.last(torch.tanh(self.first(x)))

    pipe = pipelined(Sequence(lambda: None), in_dims=1)
    found = assert_agrees(pipe, batch(4, BATCH, D, grad=True))
    assert found.shape == (4, BATCH, D)
    assert [o.combine for o in pipe.captured.outputs] == [Concatenate(1)]


def test_inputs_that_are_no_tensors_are_part_of_the_graph() -> None:
    model = Model(lambda s, x, power, *, flag: s.last(x) ** power if flag else x)
    pipe = pipelined(model)
    assert_agrees(pipe, batch(), 2, flag=True)
    with pytest.warns(UserWarning, match="flag: True → False"):
        assert_agrees(pipe, batch(), 2, flag=False)


def test_strides_of_inputs_are_free() -> None:
    pipe = pipelined(Model(lambda s, x: s.last(x)))
    assert_agrees(pipe, batch())
    assert_agrees(pipe, torch.randn(D, BATCH).t())
    assert_agrees(pipe, torch.randn(1, D).expand(BATCH, D))


def test_inputs_in_containers() -> None:
    model = Model(lambda s, x, d, *, more: s.last(x * d["a"]) * d["b"][0] + more.left - more.right)
    found = assert_agrees(
        pipelined(model),
        batch(),
        {"a": batch(), "b": [batch(grad=True)]},
        more=Pair(batch(), batch(grad=True)),
    )
    assert found.shape == (BATCH, D)


@dataclasses.dataclass
class Inputs:
    left: Tensor
    right: Tensor
    factor: int = 3


def test_inputs_in_a_dataclass() -> None:
    """Promise 4: nested dict/tuple/dataclass inputs and outputs."""
    model = Model(lambda s, x, d: s.last(x * d.left) * d.right * d.factor)
    pipe = pipelined(model)
    x, data = batch(), Inputs(batch(), batch())
    assert_close(pipe(x, data), model(x, data))
    other = Inputs(batch(), batch())
    assert_close(pipe(x, other), model(x, other))


def input_names(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    inputs = captured_of(model, *args, **kwargs).inputs
    return [i.name for i in inputs if i.kind is InputKind.INPUT]


def test_inputs_are_named_as_the_user_names_them() -> None:
    class Named(nn.Module):
        def forward(self, ids: Tensor, part: Any, *, mask: Tensor, extra: Any) -> Tensor:
            return ids * part["left"] * part["rest"][1] * mask * extra.left

    x = batch()
    names = input_names(Named(), x, {"left": x, "rest": [1.5, x]}, extra=Pair(x, 2), mask=x)
    assert names[:3] == ["ids", "part_left", "part_rest_1"]
    assert sorted(names[3:]) == ["extra_left", "mask"]


def test_names_of_inputs_that_collide_are_made_distinct() -> None:
    class Colliding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, a: Any, a_b: Tensor, p_layer_weight: Tensor, tanh: Tensor) -> Tensor:
            return torch.tanh(self.layer(a["b"])) * a_b * p_layer_weight + tanh

    args = ({"b": batch()}, batch(grad=True), batch(), batch(grad=True))
    names = input_names(Colliding(), *args)
    assert len(set(names)) == 4
    assert_agrees(pipelined(Colliding()), *args)


def test_names_of_inputs_may_be_words_of_the_generated_program() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, ctx: Tensor, args: Tensor, run: Tensor, torch: Tensor) -> Tensor:
            return self.layer(ctx).tanh() * args + run * torch

    assert_agrees(pipelined(Words()), batch(), batch(), batch(grad=True), batch())


def test_the_example_inputs_are_left_alone() -> None:
    x = batch(grad=True)
    before, version = x.detach().clone(), x._version
    captured_of(Model(lambda s, x: s.last(x)), x)
    assert torch.equal(x.detach(), before)
    assert x._version == version
    assert x.grad is None


# ------------------------------------------------------------------------------- refused


def branches(s: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:  # the line of the branch
        x = x * 2
    return s.last(x)


def test_control_flow_on_data_is_refused() -> None:
    with pytest.raises(CaptureError, match="control flow that depends on the values") as caught:
        captured_of(Model(branches), batch())
    assert caught.value.source == user_line(branches, "# the line " + "of the branch")
    assert "torch.where" in str(caught.value)


def selects(s: Any, x: Tensor) -> Tensor:
    return s.last(x)[x[:, 0] > 0]  # the line of the selection


def test_a_size_that_depends_on_data_is_refused() -> None:
    with pytest.raises(AutopipeError) as caught:
        pipelined(Model(selects))(batch())
    # torch keeps the frames of functions called `forward` only: the caller of `selects`
    code = Model.forward.__code__
    assert caught.value.source == f"{code.co_filename}:{code.co_firstlineno + 1}"
    assert "torch.where" in str(caught.value)


def test_a_batch_size_fixed_by_the_model_is_refused() -> None:
    model = Model(lambda s, x: s.last(x.view(BATCH, 2, 3).reshape(BATCH, D)))
    with pytest.raises(CaptureError, match="fixes the size of its batch dimension") as caught:
        captured_of(model, batch())
    assert caught.value.node == "x"
    assert caught.value.found == f"always {BATCH}, in a tensor of ({BATCH}, {D})"
    assert "in_dims" in str(caught.value)
    assert "x.view(x.shape[0], -1)" in str(caught.value)


def test_a_model_that_fails_is_refused_with_its_own_error() -> None:
    def fails(s: Any, x: Tensor) -> Tensor:
        return s.last(x[:, :3])  # the line that fails

    with pytest.raises(CaptureError, match="does not accept these shapes") as caught:
        captured_of(Model(fails), batch())
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.source == user_line(fails, "# the line " + "that fails")


def derives(s: Any, x: Tensor) -> Tensor:
    x = x.tanh()
    (g,) = torch.autograd.grad(s.last(x).sum(), x, create_graph=True)  # the line that derives
    return g.square().sum()


def test_gradients_taken_inside_the_model_are_refused() -> None:
    with pytest.raises(CaptureError, match="takes gradients inside its forward") as caught:
        captured_of(Model(derives), batch(grad=True))
    assert caught.value.source == user_line(derives, "# the line " + "that derives")
    x = torch.ones(1, requires_grad=True)
    assert torch.autograd.grad((2 * x).sum(), x)[0] == 2, "torch is as before"


def test_a_vmap_that_draws_is_refused() -> None:
    def draws(s: Any, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row * torch.rand(()), randomness="different")(x)

    with pytest.raises(CaptureError, match="function transform inside the model") as caught:
        captured_of(Model(draws), batch())
    assert caught.value.source is not None


def test_an_operator_with_graphs_of_its_own_is_refused() -> None:
    def conditional(s: Any, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y + 1, (x,))

    with pytest.raises(CaptureError, match=r"graphs of its own|cannot capture"):
        captured_of(Model(conditional), batch())


def test_a_call_without_batch_is_refused() -> None:
    pipe = pipelined(Model(lambda s, x: s.last(x)), in_dims=None)
    with pytest.raises(InputError, match="no input has a batch dimension"):
        pipe(batch())
    with pytest.raises(InputError, match="without samples"):
        pipelined(Model(lambda s, x: s.last(x)))(batch(0))


def test_inputs_that_differ_in_their_number_of_samples_are_named() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, pair: list[Tensor], *more: Tensor, mask: Tensor) -> Tensor:
            return x + pair[0] + pair[1] + more[0] + mask

    with pytest.raises(InputError, match="differ in their number of samples") as raised:
        pipelined(Sum())(batch(4), [batch(4), batch(1)], batch(4), mask=torch.randn(D))
    assert raised.value.found == (
        f"x: 4 in dimension 0 of (4, {D}); pair[0]: 4 in dimension 0 of (4, {D}); "
        f"pair[1]: 1 in dimension 0 of (1, {D}); args[2]: 4 in dimension 0 of (4, {D}); "
        f"mask: {D} in dimension 0 of ({D},)"
    )


def test_capture_works_on_meta() -> None:
    with torch.device("meta"):
        model = Model(lambda s, x: s.last(x))
    captured = captured_of(model, batch())
    assert [str(s) for s in captured.outputs[0].spec.shape] == ["B", str(D)]
    assert all(p.is_meta for p in model.parameters())
    leaves, _ = pytree.tree_flatten([o.spec.dtype for o in captured.outputs])
    assert leaves == [torch.float64]


class Scaled(nn.Module):
    """Parameters, tied ones among them, a buffer, a constant and a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.head = nn.Linear(D, D, bias=False)
        self.head.weight = self.first.weight
        self.register_buffer("scale", torch.ones(D))
        self.constant = torch.arange(float(D))

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(torch.tanh(self.first(x))) * self.scale + self.constant
        return self.head(x) + torch.arange(D, device=x.device)


def test_capture_works_on_several_devices() -> None:
    """As once a pipeline has placed the parameters. Truth: the graph of the model on one device."""
    model, x = Scaled(), batch()
    expected = captured_of(model, x)
    placed = {}
    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU need not be there
        for device, layer in (("cuda:0", model.first), ("cuda:1", model.last)):
            for name, parameter in list(layer.named_parameters()):
                moved = nn.Parameter(torch.empty(parameter.shape, device=device))
                layer.register_parameter(name, moved)
                placed[moved] = device
    model.head.weight = model.first.weight
    examples = [x]
    with gather_on_one_device(model, examples):
        gathered = [*examples, *model.parameters(), *model.buffers()]
        assert {t.device.type for t in gathered} == {"cpu"}
        assert model.head.weight is model.first.weight
    found = captured_of(model, x)
    graphs = found.graph_module.graph, expected.graph_module.graph
    assert fingerprint(graphs[0]) == fingerprint(graphs[1])
    assert [(i.name, i.kind, i.target) for i in found.inputs] == [
        (i.name, i.kind, i.target) for i in expected.inputs
    ]
    assert {str(n.meta["val"].device) for n in graphs[0].nodes if "val" in n.meta} == {"cpu"}
    assert {p: str(p.device) for p in model.parameters()} == placed, "the model is as it was"


# ------------------------------------------------------------------------- what torch.export says


class FailingTextError(RuntimeError):
    def __str__(self) -> str:
        raise ValueError("no text")


def test_an_error_without_text_is_not_masked() -> None:
    assert explain(FailingTextError(), nn.Identity()).found == (
        "FailingTextError: (no text: its __str__ raised ValueError)"
    )


@pytest.mark.skipif(sys.version_info < (3, 11), reason="frames do not tell their columns")
def test_a_distribution_that_checks_its_parameters() -> None:
    def forward(model: Model, x: Tensor) -> Tensor:
        q = torch.distributions.Normal(model.first(x), 1.0, validate_args=True)  # the distribution
        return q.rsample()

    with pytest.warns(UserWarning, match="checks values of tensors") as caught:
        captured_of(Model(forward), batch())
    line = user_line(test_a_distribution_that_checks_its_parameters, "# the " + "distribution")
    assert line in str(caught[0].message)


def test_an_encoder_that_zeroes_padded_positions_in_evaluation() -> None:
    """Eager does so without gradients only, and only for some masks: a warning says it."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=True), 2)
    x, padded = torch.randn(4, 5, D), torch.arange(5)[None] >= torch.tensor([5, 3, 2, 4])[:, None]

    def said(**arguments: Any) -> list[str]:
        pipe = pipelined(encoder)
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = pipe(x, **arguments)
            pipe(x, **arguments)
            assert_close(y[~padded], encoder(x, **arguments)[~padded])
        return [str(w.message) for w in caught if "padded" in str(w.message)]

    assert said(src_key_padding_mask=padded) == []  # in training
    encoder.eval()
    (warning,) = said(src_key_padding_mask=padded)
    assert "enable_nested_tensor=False" in warning
    assert said() == []
    encoder.use_nested_tensor = False
    assert said(src_key_padding_mask=padded) == []


def test_an_array_whose_memory_a_tensor_shares() -> None:
    """The tracer's own note of such a constant is not taken for a tensor that the forward keeps."""
    model = Model(lambda s, x: s.first(x) + torch.from_numpy(s.array))
    model.array = np.arange(D, dtype=np.float64)
    pipe, x = pipelined(model), batch()
    assert_close(pipe(x), model(x))
    model.array[:] = 3
    assert_close(pipe(x), model(x))


KEPT: list[Any] = []


def test_such_a_tensor_that_is_kept() -> None:
    def forward(model: Model, x: Tensor) -> Tensor:
        constant = torch.from_numpy(model.array)
        KEPT.append(lambda: constant)
        return model.first(x) + constant

    model = Model(forward)
    model.array = np.arange(D, dtype=np.float64)
    pipe = pipelined(model)
    with contextlib.suppress(CaptureError):
        pipe(batch())
        assert KEPT == []  # undone
    KEPT.clear()
    assert type(model(batch())) is Tensor


@pytest.mark.parametrize("share", [torch.from_numpy, torch.as_tensor, torch.asarray, torch.tensor])
@pytest.mark.parametrize("write", [lambda t: t.add_(1), lambda t: t[1:].mul_(2)])
def test_writes_to_the_memory_of_an_array(share: Any, write: Any) -> None:
    """The next call of the model itself would find them."""

    def forward(model: Model, x: Tensor) -> Tensor:
        constant = share(model.array)
        write(constant)
        return model.first(x) + constant

    model = Model(forward)
    model.array = np.arange(D, dtype=np.float64)
    pipe, x = pipelined(model), batch()
    if share is torch.tensor:  # a copy
        assert_close(pipe(x), model(x))
    else:
        with pytest.raises(CaptureError, match="memory of an array"):
            pipe(x)
    assert model.array.tolist() == list(range(D))
