"""What needs CUDA: several stages on one GPU exercise streams and events; two GPUs, transfers.

Truth is the captured graph under plain autograd on the same GPU, over the same chunks. Kernels that
add in any order (atomics) are switched off where torch can.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autopipe
from tests.support.models import MODELS
from tests.support.reference import objective, over_chunks

pytestmark = pytest.mark.gpu
ONE = ["cuda:0"]


@pytest.fixture(autouse=True)
def _deterministic() -> Any:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _to(device: str, inputs: Any) -> Any:
    return pytree.tree_map(
        lambda x: (
            x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        ),
        inputs,
    )


def _made(name: str) -> Any:
    """A model and its inputs; a machine with a GPU may be without diffusers."""
    if name == "unet":
        pytest.importorskip("diffusers")
    return MODELS[name].make()


@pytest.mark.few(10)
@pytest.mark.parametrize("remat", ["none", "full", "min-cut"])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("name", [n for n, e in MODELS.items() if not e.random])
def test_all_stages_on_one_gpu(name: str, devices: int, remat: str) -> None:
    model, inputs = _made(name)
    model.cuda()
    for chunks, batch in ((1, 4), (3, 10), (4, 4)):
        args, kwargs = _to("cuda:0", inputs(batch))
        pipe = autopipe.compile(model, ONE * devices, chunks, remat=remat, args=args, kwargs=kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        truth = over_chunks(pipe.captured, model, leaves, chunks)
        model.zero_grad()
        result = pipe(*args, **kwargs)
        objective(result).backward()
        pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(truth.result), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
        scale = max(g.abs().max() for g in truth.parameters.values() if g is not None)
        for key, gradient in truth.parameters.items():
            found = model.get_parameter(key).grad
            if gradient is None:
                assert found is None
            else:
                assert (found - gradient).abs().max() <= 2e-6 * scale, key


def test_model_on_the_cpu_is_moved() -> None:
    model, inputs = MODELS["gpt2"].make()
    before = [id(p) for p in model.parameters()]
    pipe = autopipe.compile(model, ONE * 2, 2)
    _, kwargs = inputs(4)
    pipe(**kwargs).loss.backward()
    assert [id(p) for p in model.parameters()] == before
    assert all(p.device.type == "cuda" for p in model.parameters())


def test_randomness_on_one_gpu() -> None:
    model, inputs = MODELS["gpt2_dropout"].make()
    model.cuda()
    _, kwargs = _to("cuda:0", inputs(4))
    gradients = []
    for devices, remat in ((1, "none"), (2, "full"), (3, "min-cut")):
        pipe = autopipe.compile(model, ONE * devices, 2, remat=remat)
        model.zero_grad()
        torch.manual_seed(3)
        loss = pipe(**kwargs).loss
        loss.backward()
        gradients.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    for loss, found in gradients[1:]:
        assert torch.equal(loss, gradients[0][0])
        assert all(torch.allclose(a, b) for a, b in zip(found, gradients[0][1], strict=True))


def test_measuring_leaves_the_random_state_alone() -> None:
    model, inputs = MODELS["gpt2_dropout"].make()
    _, kwargs = inputs(4)
    before = torch.get_rng_state(), torch.cuda.get_rng_state(0)
    autopipe.plan(model, ONE * 2, 2, profile=True, kwargs=kwargs)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.cuda.get_rng_state(0), before[1])


@pytest.mark.parametrize("name", ["gpt2", "gpt2_dropout", "unet", "resnet"])
@pytest.mark.parametrize("devices", [ONE * 2, ["cuda:0", "cuda:1"], ["cpu", "cuda:0"]])
def test_verify(name: str, devices: list[str]) -> None:
    """From inputs and a model on the CPU, which the comparison must gather to run."""
    if torch.cuda.device_count() < len({d for d in devices if d != "cpu"}):
        pytest.skip("needs two GPUs")
    model, inputs = _made(name)
    args, kwargs = inputs(6)
    found = autopipe.compile(model, devices, 3).verify(*args, **kwargs)
    assert found.ok, str(found)
    assert found.worst("gradient") is not None


@pytest.mark.parametrize("devices", [["cpu", "cuda:0"], ["cuda:0", "cuda:1"]])
def test_a_capture_places_before_the_state_of_an_optimizer_is_loaded(devices: list[str]) -> None:
    """Parameters, gradients and running statistics; the optimizer is made before."""
    if torch.cuda.device_count() < len({d for d in devices if d != "cpu"}):
        pytest.skip("needs two GPUs")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).double()
    twin, x = copy.deepcopy(model), torch.randn(8, 4, dtype=torch.double)
    ours, plain = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin))
    for m, optimizer in ((model, ours), (twin, plain)):
        m(x).square().sum().backward()
        optimizer.step()
    saved = copy.deepcopy(ours.state_dict())
    pipe = autopipe.compile(model, devices, 1, args=(x,))
    ours.load_state_dict(saved)
    stages = {name: s.device for s in pipe.stages for name in s.parameters}
    assert {str(d) for d in stages.values()} == set(devices)
    for name, parameter in pipe.named_parameters():
        assert parameter.device == parameter.grad.device == stages[name]
        assert ours.state[parameter]["exp_avg"].device == stages[name]
    assert str(model[1].running_mean.device) in devices
    assert {*pipe.hf_device_map.values()} == {*stages.values()}
    pipe(x).square().sum().backward()  # added to the gradients that there are
    twin(x).square().sum().backward()
    ours.step()
    plain.step()
    for found, expected in zip(
        model.state_dict().values(), twin.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus() -> None:
    for name in ("gpt2", "unet", "tied"):
        model, inputs = _made(name)
        args, kwargs = inputs(6)
        result = autopipe.compile(model, 2, 3)(*args, **kwargs)
        objective(result).backward()
        assert {p.device for p in model.parameters()} == {
            torch.device("cuda", 0),
            torch.device("cuda", 1),
        }


def test_a_model_is_captured_again_where_its_parameters_are() -> None:
    """Another mode, after the pipeline has moved the model to the GPU; the inputs stay behind."""
    model, inputs = MODELS["resnet"].make()
    pipe = autopipe.compile(model, ONE * 2, 2)
    args, kwargs = inputs(4)
    pipe(*args, **kwargs)
    pipe.eval()
    with torch.no_grad():
        found = pipe(*args, **kwargs).logits
        args, kwargs = _to("cuda:0", (args, kwargs))
        expected = model.cuda().eval()(*args, **kwargs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_steps_are_measured_by_events(schedule: Any) -> None:
    layers = [nn.Linear(256, 256) for _ in range(6)]
    model, x = nn.Sequential(*layers).cuda(), torch.randn(64, 256, device="cuda")

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x).square().mean()

    pipe = autopipe.compile(Scored(), ONE * 2, 4, schedule=schedule)
    with pipe.profile() as measured:
        for _ in range(3):
            pipe(x).backward()
    assert len(measured.steps) == 3
    for line in measured.steps:
        line.verify(measured.found.scheduled)
        assert line.makespan > 0
