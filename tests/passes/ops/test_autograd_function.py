"""Models with an autograd.Function of their own: its backward is the one that runs."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autopipe.errors import CaptureError, CouplingError
from tests.support.agreement import assert_agrees, pipelined
from tests.support.programs import captured_of, user_line

pytestmark = [pytest.mark.few(3), pytest.mark.usefixtures("traces_once")]


class Straight(torch.autograd.Function):
    """A straight-through estimator: rounding has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: int) -> Tensor:
        return (x * steps).round() / steps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * 3, None


class Product(torch.autograd.Function):
    """Two inputs, two results, saved tensors, a gradient that nobody else would compute."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, options: dict[str, float]) -> tuple[Tensor, Tensor]:
        return x * y * options["scale"], x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None]:
        x, y = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            (gradient * y.exp() if wanted[0] else None),
            (gradient + x) if wanted[1] else None,
            None,
        )


class Model(nn.Module):
    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.f = f

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x)


def rounds(s: Model, x: Tensor) -> Tensor:
    return s.last(Straight.apply(s.first(x), 4)).sum()


def rounds_twice(s: Model, x: Tensor) -> Tensor:
    return Straight.apply(s.last(Straight.apply(s.first(x), 4)), 8)


def multiplies(s: Model, x: Tensor) -> Tensor:
    y, sign = Product.apply(s.first(x), s.last.weight[0], {"scale": 0.5})
    return s.last(y) + sign


straight = Straight.apply
product = functools.partial(Product.apply)


def kept_before(s: Model, x: Tensor) -> Tensor:
    """The form of torch's own tutorials: `apply` is looked up once, before any capture."""
    y, sign = product(straight(s.first(x), 4), s.last.weight[0], {"scale": 0.5})
    return s.last(y) + sign


def without_gradients(s: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = Straight.apply(s.first(x), 4)
    return s.last(x + y)


@pytest.mark.parametrize("f", [rounds, rounds_twice, multiplies, kept_before, without_gradients])
@pytest.mark.parametrize("remat", ["full", "none", "min-cut"])
def test_the_users_backward_runs(f: Callable[..., Any], remat: str) -> None:
    pipe = pipelined(Model(f), remat=remat)
    for size in (7, 2):
        assert_agrees(pipe, torch.randn(size, 4, dtype=torch.float64).requires_grad_())
    with torch.no_grad():
        x = torch.randn(5, 4, dtype=torch.float64)
        torch.testing.assert_close(pipe(x), pipe.model(x), rtol=1e-12, atol=1e-12)


def test_calls_of_one_kind_are_one_call() -> None:
    """Stages that make the same calls are traced once."""
    captured = captured_of(Model(lambda s, x: Straight.apply(Straight.apply(x, 4), 4)), batch())
    sites = {
        n.args[1]
        for n in captured.graph_module.graph.nodes
        if n.target is torch.ops.autopipe.function.default
    }
    assert len(sites) == 1


def test_its_place_is_a_note_of_the_plan() -> None:
    """No rule tells how it treats the samples: that was tried, and the plan says so."""
    pipe = pipelined(Model(rounds))
    pipe(batch())
    assert "keeps samples apart, as a trial" in pipe.explain()


class Sorts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Changes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Counts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, int]:
        return x * 2, 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Tensor:
        return gradient * 2


def changes(s: Model, x: Tensor) -> Tensor:
    return Changes.apply(s.first(x))  # the line that changes


def counts(s: Model, x: Tensor) -> Tensor:
    return Counts.apply(s.first(x))[0]  # the line that counts


@pytest.mark.parametrize(
    ("f", "line", "problem"),
    [
        (changes, "# the line " + "that changes", "changes an argument in place"),
        (counts, "# the line " + "that counts", "something other than tensors"),
    ],
)
def test_what_cannot_be_kept_is_refused(f: Callable[..., Any], line: str, problem: str) -> None:
    with pytest.raises(CaptureError, match=problem) as caught:
        captured_of(Model(f), batch())
    assert caught.value.source == user_line(f, line)
    assert str(caught.value.found).startswith(__name__)


SCALE = nn.Parameter(torch.ones(4, dtype=torch.float64))


class Closes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * SCALE

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * SCALE


def closes(s: Model, x: Tensor) -> Tensor:
    return Closes.apply(s.first(x))


def test_a_tensor_that_is_no_argument_is_refused() -> None:
    """In the captured graph it would be a constant, whatever the optimizer does to it."""
    with pytest.raises(
        CaptureError, match="uses a tensor that is not one of its arguments"
    ) as caught:
        pipelined(Model(closes))(batch())
    assert str(caught.value.source).startswith(__file__)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_in_the_model_are_left_to_the_pipeline(reentrant: bool) -> None:
    def checkpointed(s: Model, x: Tensor) -> Tensor:
        return s.last(checkpoint(s.first, x, use_reentrant=reentrant))

    pipe = pipelined(Model(checkpointed))
    assert_agrees(pipe, batch().requires_grad_())


def test_one_that_mixes_samples_is_refused() -> None:
    with pytest.raises(CouplingError, match="a trial did not show"):
        captured_of(Model(lambda s, x: Sorts.apply(s.first(x))), batch())


class Scales(torch.autograd.Function):
    """Two results; a backward that scales by a parameter's values and keeps samples apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        return x * w, x.exp()

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w + h * x.exp(), (g * x).sum(0)


def normed(g: Tensor) -> Tensor:
    return g / (g.norm() + 1e-6)


def centred(g: Tensor) -> Tensor:
    return g - g.mean(0, keepdim=True)


def scaled_by_size(g: Tensor) -> Tensor:
    return g / g.shape[0]


@pytest.mark.parametrize("change", [normed, centred, scaled_by_size])
def test_a_backward_that_mixes_samples_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    """Its forward does not: only a trial of the gradients shows it."""

    class Passes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return change(gradient)

    with pytest.raises(CouplingError, match="backward of a custom Function mixes") as caught:
        captured_of(Model(lambda s, x: s.last(Passes.apply(s.first(x)))), batch())
    assert str(caught.value.source).startswith(__file__)


def test_a_parameters_gradient_is_a_sum_over_samples() -> None:
    model = Model(lambda s, x: torch.cat(Scales.apply(s.first(x), s.last.bias), 1))
    pipe = pipelined(model)
    assert_agrees(pipe, batch())
    assert "trial on 6 samples" in pipe.explain()


def batch() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64)


class Factor:
    """An argument of a Function, by identity."""

    def __init__(self, value: float) -> None:
        self.value = value


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Factor) -> Tensor:
        ctx.factor = factor
        return x * factor.value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor.value, None


def times(factor: Factor) -> Model:
    return Model(lambda s, x: s.last(Times.apply(s.first(x), factor)).sum())


def test_pipelines_that_share_an_argument_do_not_need_each_other() -> None:
    factor = Factor(3.0)
    first, second = pipelined(times(factor)), pipelined(times(factor))
    first(batch()), second(batch())
    del first
    gc.collect()
    for size in (9, 4):  # traced anew
        assert_agrees(second, torch.randn(size, 4, dtype=torch.float64))


def test_a_copy_of_a_pipeline_has_its_own() -> None:
    pipe = pipelined(Model(rounds))
    pipe(batch())
    copied = copy.deepcopy(pipe)
    del pipe
    gc.collect()
    assert_agrees(copied, batch())


def test_an_argument_lives_as_long_as_the_captured_graph() -> None:
    factor = Factor(3.0)
    captured = captured_of(times(factor), batch())
    dropped = weakref.ref(factor)
    del factor
    gc.collect()
    assert dropped() is not None
    assert len(captured.functions) == 1
    del captured
    gc.collect()
    assert dropped() is None


def test_a_graph_without_its_pipeline_says_so() -> None:
    with pytest.raises(CaptureError, match="pipeline is gone"):
        torch.ops.autopipe.function([torch.zeros(2)], 10**9)
