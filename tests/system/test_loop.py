"""The training loops that people have: optimizers, accumulation, clipping, freezing, hooks.

Each loop runs twice, on a pipeline and on a copy of its model in eager torch on the whole batch,
in double precision (`tests.support.loops.alike`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.agreement import assert_close, pipelined
from tests.support.loops import alike, ids, loss_of

pytestmark = [pytest.mark.few(1), pytest.mark.usefixtures("alike_models_once")]

# ------------------------------------------------------------------------------- optimizers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "adamw single": lambda p: torch.optim.AdamW(p, 1e-2, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    def loop(module: nn.Module) -> Any:
        optimizer = OPTIMIZERS[name](module.parameters())
        losses = []
        for step in range(5):
            optimizer.zero_grad()
            losses.append(loss_of(module, step))
            losses[-1].backward()
            optimizer.step()
        return losses

    alike(loop)


def test_an_optimizer_that_calls_back() -> None:
    """LBFGS runs forward and backward several times within one step."""

    def loop(module: nn.Module) -> Any:
        optimizer = torch.optim.LBFGS(module.parameters(), max_iter=3)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(module)
            loss.backward()
            return loss

        return [optimizer.step(closure) for _ in range(2)]

    alike(loop)


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Tanh(), nn.Linear(4, 3)).double()
    reference = copy.deepcopy(model)
    pipe = pipelined(model)
    for module in (pipe, reference):
        optimizer = torch.optim.SparseAdam([next(module.parameters())], 0.1)
        for step in range(3):
            optimizer.zero_grad()
            module(ids(step)).pow(2).sum().backward()
            optimizer.step()
    assert model[0].weight.grad.is_sparse
    assert_close(model[0].weight.grad.to_dense(), reference[0].weight.grad.to_dense())
    assert_close(model[0].weight, reference[0].weight)


def test_several_optimizers_on_disjoint_parameters() -> None:
    def loop(module: nn.Module) -> Any:
        named = dict(module.named_parameters())
        norms = [p for n, p in named.items() if "norm" in n]
        rest = [p for n, p in named.items() if "norm" not in n]
        optimizers = [torch.optim.SGD(norms, 0.1), torch.optim.AdamW(rest, 1e-2)]
        losses = []
        for step in range(6):
            losses.append(loss_of(module, step))
            losses[-1].backward()
            optimizers[step % 2].step()
            optimizers[step % 2].zero_grad()  # the other's gradients go on growing
        return losses

    alike(loop)


def test_parameter_groups_by_name() -> None:
    """Weight decay for matrices only, told apart by the names that the pipeline gives."""

    def loop(module: nn.Module) -> Any:
        plain = ("bias", "norm")
        groups = [
            {"params": [p for n, p in module.named_parameters() if any(w in n for w in plain)]},
            {
                "params": [
                    p for n, p in module.named_parameters() if not any(w in n for w in plain)
                ],
                "weight_decay": 0.5,
            },
        ]
        assert [len(g["params"]) for g in groups] == [6, 3]
        optimizer = torch.optim.AdamW(groups, 1e-2, weight_decay=0.0)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(module, step).backward()
            optimizer.step()

    alike(loop)


def test_a_learning_rate_schedule() -> None:
    def loop(module: nn.Module) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=6)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        rates = []
        for step in range(6):
            optimizer.zero_grad()
            loss = loss_of(module, step)
            loss.backward()
            optimizer.step()
            cycle.step()
            plateau.step(loss.item())
            rates.append(optimizer.param_groups[0]["lr"])
        assert len(set(rates)) > 3
        return rates

    alike(loop)


# ------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", [1.0, 2.0, float("inf")])
def test_clipping_by_norm(kind: float) -> None:
    def loop(module: nn.Module) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        norms = []
        for step in range(4):
            optimizer.zero_grad()
            loss_of(module, step).backward()
            norms.append(nn.utils.clip_grad_norm_(module.parameters(), 1e-2, norm_type=kind))
            optimizer.step()
        assert min(norms) > 1e-2, "something must have been clipped"
        return norms

    alike(loop)


def test_clipping_by_value() -> None:
    def loop(module: nn.Module) -> Any:
        loss_of(module).backward()
        nn.utils.clip_grad_value_(module.parameters(), 1e-3)
        return max(p.grad.abs().max() for p in module.parameters())

    alike(loop)


def test_gradients_accumulate_over_batches_of_different_sizes() -> None:
    def loop(module: nn.Module) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
        for step in range(6):
            (loss_of(module, step, batch=3 + step) / 3).backward()
            if step % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    alike(loop)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first first", "last first"])
def test_two_forwards_then_two_backwards(order: tuple[int, int]) -> None:
    def loop(module: nn.Module) -> Any:
        losses = [loss_of(module, 0), loss_of(module, 1, batch=4)]
        for n in order:
            losses[n].backward()
        return losses

    pipe = alike(loop)
    assert all(s.now == 0 for s in pipe.memory.stages)


def test_losses_of_several_calls_added_up() -> None:
    """With one call whose result is not used, which gets no gradient and holds nothing back."""

    def loop(module: nn.Module) -> Any:
        unused = loss_of(module, 9)
        total = loss_of(module, 0) + 2 * loss_of(module, 1, batch=2) - loss_of(module, 2).sin()
        total.backward()
        return total, unused

    alike(loop)


def test_a_call_on_the_result_of_another() -> None:
    """The pipeline as its own input: gradients flow through both calls."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    x = torch.randn(7, 6, dtype=torch.double)
    alike(lambda module: module(module(x)).pow(2).sum().backward(), model)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none: bool) -> None:
    def loop(module: nn.Module) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
        kept = []
        for step in range(4):
            loss_of(module, step).backward()
            optimizer.step()
            kept.append(module.first.weight.grad)
            optimizer.zero_grad(set_to_none=to_none)
            if to_none:
                assert module.first.weight.grad is None
            else:
                assert not module.first.weight.grad.any()
        assert all((g is kept[0]) != to_none for g in kept[1:]), "zeroed gradients are added to"
        loss_of(module, 5).backward()

    alike(loop)


def test_gradients_of_some_parameters_only() -> None:
    """`inputs=` and `torch.autograd.grad` leave the other gradients alone."""

    def loop(module: nn.Module) -> Any:
        loss_of(module, 0).backward(inputs=[module.first.weight, module.table.weight])
        assert module.second.weight.grad is None
        wanted = [module.norm.weight, module.second.bias]
        return torch.autograd.grad(loss_of(module, 1), wanted)

    alike(loop)


def test_freezing_and_thawing_between_steps() -> None:
    """The head first, then layer by layer, then all but the table, as one does in fine-tuning."""

    def loop(module: nn.Module) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
        plan = [("last_norm",), ("last_norm", "second"), ("first", "norm", "second"), ("table",)]
        for step, trained in enumerate([*plan, *plan]):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name.startswith(trained))
            optimizer.zero_grad()
            loss_of(module, step).backward()
            grads = {n for n, p in module.named_parameters() if p.grad is not None}
            assert grads == {n for n, p in module.named_parameters() if n.startswith(trained)}
            optimizer.step()

    alike(loop, devices=3)


def test_everything_frozen() -> None:
    def loop(module: nn.Module) -> Any:
        module.requires_grad_(False)
        fixed = module(ids())
        assert not fixed.requires_grad
        module.first.requires_grad_(True)
        loss_of(module).backward()
        return fixed

    alike(loop)


# ------------------------------------------------------------------------------- hooks


def test_hooks_see_the_whole_batchs_gradient_once() -> None:
    def loop(module: nn.Module) -> Any:
        seen: list[tuple[str, Tensor]] = []
        for name, parameter in module.named_parameters():
            parameter.register_hook(lambda g, name=name: seen.append((name, g.clone())))
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: seen.append((f"{name}.grad", p.grad.clone()))
            )
        for step in range(2):
            loss_of(module, step).backward()
        assert len(seen) == 2 * 2 * len(list(module.parameters()))
        return [g for _, g in sorted(seen, key=lambda entry: entry[0])]

    alike(loop)


def test_a_hook_that_changes_the_gradient() -> None:
    def loop(module: nn.Module) -> Any:
        module.first.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        handle = module.table.weight.register_hook(lambda g: 2 * g)
        loss_of(module, 0).backward()
        handle.remove()
        loss_of(module, 1).backward()

    alike(loop)


def test_an_optimizer_in_the_backward() -> None:
    """One optimizer per parameter, stepped by its hook, so that no gradient outlives backward."""

    def loop(module: nn.Module) -> Any:
        for parameter in module.parameters():
            optimizer = torch.optim.AdamW([parameter], 1e-2)

            def update(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(update)
        losses = []
        for step in range(3):
            losses.append(loss_of(module, step))
            losses[-1].backward()
            assert all(p.grad is None for p in module.parameters())
        return losses

    alike(loop)


def test_hooks_on_results() -> None:
    def loop(module: nn.Module) -> Any:
        seen: list[Tensor] = []
        out = module(ids())
        out.register_hook(seen.append)
        out.retain_grad()
        out.pow(2).sum().backward()
        return seen, out.grad

    alike(loop)
