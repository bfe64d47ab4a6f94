"""What people do to the inside of models, and what torch wraps around them.

Truth is a copy of the model under the same treatment (`tests.support.loops.alike`). Where a
pipeline cannot
do what the model can, it must say so: an `AutopipeError`, before anything is computed wrongly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import autopipe
from autopipe import errors
from tests.support.agreement import assert_agrees, pipelined
from tests.support.loops import Loop, Net, alike, ids, loss_of, net, train

pytestmark = [pytest.mark.few(1), pytest.mark.usefixtures("alike_models_once")]

# ------------------------------------------------------------------------------- parametrizations


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.triu()


WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm of each entry": lambda m: parametrizations.weight_norm(m, dim=None),
    "orthogonal": parametrizations.orthogonal,
    "a function of one's own": lambda m: parametrize.register_parametrization(
        m, "weight", Symmetric()
    ),
    "pruning": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_parametrized_weights(wrap: str) -> None:
    def loop(module: nn.Module) -> Any:
        losses = train(module)
        assert module.second.weight.shape == (8, 8)
        return losses

    models = net(), net()
    for model in models:
        WRAPS[wrap](model.second)
        WRAPS[wrap](model.first)
    alike(loop, *models)


def test_a_parametrization_that_is_removed() -> None:
    def loop(module: nn.Module) -> Any:
        losses = train(module, 2)
        parametrize.remove_parametrizations(module.second, "weight")
        return losses, train(module, 2)

    models = net(), net()
    for model in models:
        parametrizations.weight_norm(model.second)
    alike(loop, *models)


def test_cached_parametrizations() -> None:
    def loop(module: nn.Module) -> Any:
        with parametrize.cached():
            (loss_of(module, 0) + loss_of(module, 1)).backward()
        with parametrize.cached(), torch.no_grad():
            return loss_of(module, 2)

    model = net()
    parametrizations.weight_norm(model.second)
    alike(loop, model)


# ------------------------------------------------------------------------------- changed models


class Annealed(Net):
    temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.temperature


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a number": lambda m: setattr(m, "temperature", 0.5),
    "a layer's attribute": lambda m: setattr(m.norm, "eps", 0.1),
    "a layer": lambda m: setattr(m, "drop", nn.Tanh()),
    "a larger table": lambda m: (
        torch.manual_seed(1),
        setattr(m, "table", nn.Embedding(13, 8).double()),
        setattr(m.head, "weight", m.table.weight),
    ),
    "a tie undone": lambda m: setattr(m.head, "weight", nn.Parameter(m.table.weight.detach() / 2)),
    "a hook": lambda m: m.second.register_forward_hook(lambda *a: 2 * a[-1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_changed_between_steps(change: str) -> None:
    """An annealed temperature, a layer exchanged: the next step must know, or refuse."""

    def loop(module: nn.Module) -> Any:
        train(module, 1)
        CHANGES[change](module.model if isinstance(module, autopipe.Pipeline) else module)
        return train(module, 1)

    torch.manual_seed(0)
    alike(loop, Annealed().double())


def test_a_layer_put_in_for_another_with_other_parameters() -> None:
    """A new head, as in fine-tuning: its parameters are found and trained."""

    def loop(module: nn.Module) -> Any:
        losses = train(module, 1)
        torch.manual_seed(1)
        module.second = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)).double()
        return losses, train(module, 2)

    alike(loop)


def test_layers_that_come_back_in_another_order() -> None:
    """A, B, B, A, then A, B, A, B: the same modules and parameters, another model."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), second, nn.Tanh(), first)
    pipe, x = pipelined(model), torch.randn(5, 4, dtype=torch.double)
    assert_agrees(pipe, x)
    model[4], model[6] = first, second
    assert_agrees(pipe, x)


def test_a_forward_hook_of_a_layer() -> None:
    """A hook that is there when the model is captured is a part of it."""

    def loop(module: nn.Module) -> Any:
        module.second.register_forward_hook(lambda m, args, out: 2 * out)
        module.first.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        return train(module)

    alike(loop)


def test_forward_hooks_of_layers_that_look_on() -> None:
    """They would see nothing of later steps: they are named, with layer and line."""
    pipe = pipelined(net())
    train(pipe, 1)
    seen: list[Tensor] = []
    pipe.model.second.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    with pytest.warns(UserWarning, match=r"hook of second \(.*test_loop_wrappers.py:\d+\) returns"):
        train(pipe, 2)
    alike(train)


def test_one_forward_hook_of_several_layers_is_named_once() -> None:
    pipe = pipelined(net())
    for layer in (pipe.model.first, pipe.model.second):
        layer.register_forward_hook(lambda m, args, out: None)
    with pytest.warns(UserWarning, match=r"hook of first and 1 more \(") as warned:
        train(pipe, 1)
    assert sum("forward hook" in str(w.message) for w in warned) == 1


@pytest.mark.parametrize("wrap", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_what_a_forward_hook_of_torch_itself_does_is_captured(wrap: Callable[..., Any]) -> None:
    """Weight norm is a hook that returns nothing: it sets the weight. That is no cause to warn."""

    def loop(module: nn.Module) -> Any:
        torch.manual_seed(0)
        wrap(module.second)
        return train(module, 2)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        alike(loop)


def test_a_backward_hook_of_a_layer_is_refused_also_later() -> None:
    pipe = pipelined(net())
    train(pipe, 1)
    pipe.model.second.register_full_backward_hook(lambda m, gi, go: None)
    with pytest.raises(errors.CaptureError, match="hook"):
        train(pipe, 1)


def test_hooks_of_the_pipeline_itself() -> None:
    """Run as a module's: around the whole call."""

    def loop(module: nn.Module) -> Any:
        module.register_forward_pre_hook(lambda m, args: (args[0].flip(0),))
        module.register_forward_hook(lambda m, args, out: 2 * out)
        seen: list[Tensor] = []
        module.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].clone()))
        return train(module), seen

    alike(loop)


# ------------------------------------------------------------------------------- torch's wrappers


def functional(module: nn.Module) -> Any:
    new = {n: (2 * p.detach()).requires_grad_() for n, p in module.named_parameters()}
    x = ids()
    out = torch.func.functional_call(module, new, (x,), tie_weights=True)
    return out, torch.autograd.grad(out.pow(2).sum(), list(new.values()))


def gradient_by_transform(module: nn.Module) -> Any:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (ids(),)).pow(2).sum()

    return torch.func.grad(loss)({n: p.detach() for n, p in module.named_parameters()})


def mapped(module: nn.Module) -> Any:
    return torch.func.vmap(module)(torch.stack([ids(0), ids(1)])).detach()


def forward_mode(module: nn.Module) -> Any:
    names = [n for n, _ in module.named_parameters()]
    values = [p.detach() for p in module.parameters()]

    def run(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), ids())

    return torch.func.jvp(run, tuple(values), tuple(torch.ones_like(v) for v in values))[1]


def gradients_in_batches(module: nn.Module) -> Any:
    out = module(ids())
    seeds = torch.stack([torch.ones_like(out), out.detach()])
    return torch.autograd.grad(out, list(module.parameters()), seeds, is_grads_batched=True)


WRAPPERS: dict[str, Loop] = {
    "functional_call": functional,
    "func.grad": gradient_by_transform,
    "vmap": mapped,
    "jvp": forward_mode,
    "is_grads_batched": gradients_in_batches,
}


@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_function_transforms(name: str, called: bool) -> None:
    """Refused, except `functional_call` on a pipeline that was captured with its own parameters."""

    def loop(module: nn.Module) -> Any:
        if called:
            loss_of(module)
        return WRAPPERS[name](module)

    if name == "functional_call" and called:
        alike(loop)
        return
    problem = "has been replaced" if name == "functional_call" else "a function transform around"
    with pytest.raises(errors.UnsupportedError, match=problem):
        loop(pipelined(net()))


def test_forward_mode_is_refused() -> None:
    """A missing tangent would be taken for a zero derivative."""
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double(), torch.randn(7, 6).double()
    pipe = pipelined(model)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(errors.UnsupportedError, match="forward-mode differentiation"):
            pipe(dual)


def test_torch_compile_of_a_pipeline() -> None:
    """The pipeline runs uncompiled, between compiled parts."""

    def loop(module: nn.Module) -> Any:
        if isinstance(module, autopipe.Pipeline):
            module = torch.compile(module, backend="eager")
        loss = loss_of(module)
        loss.backward()
        return loss

    alike(loop)


def offloaded(module: nn.Module) -> Any:
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(module)
    loss.backward()
    return loss


def checkpointed(module: nn.Module) -> Any:
    out = checkpoint(module, ids(), use_reentrant=False)
    out.pow(2).sum().backward()
    return out


SAVING: dict[str, Loop] = {"checkpoint": checkpointed, "save_on_cpu": offloaded}


@pytest.mark.parametrize("name", SAVING)
def test_saved_tensor_hooks_around_a_compiled_call(name: str) -> None:
    def loop(module: nn.Module) -> Any:
        loss_of(module).backward()
        return SAVING[name](module)

    alike(loop)


def test_a_checkpoint_around_a_first_call() -> None:
    alike(checkpointed)


def test_offloading_around_a_first_call() -> None:
    alike(offloaded)
