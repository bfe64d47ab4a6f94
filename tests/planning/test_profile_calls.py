"""Measured times: each distinct call once, and remembered.

Covers profile.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe.profile
from autopipe.errors import DeviceError, InputError, UnsupportedError
from autopipe.passes.cost.node_costs import annotate
from autopipe.passes.ir.captured import Annotated
from autopipe.planning.profile_cache import cache_file
from autopipe.planning.profile_calls import Profile, device_name, profile
from tests.support.models import MODELS
from tests.support.programs import calls, captured_of, known

pytestmark = pytest.mark.few(2)

CPU = torch.device("cpu")
aten = torch.ops.aten


def stack(depth: int, width: int = 8) -> Annotated:
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
    return annotate(captured_of(nn.Sequential(*layers), torch.randn(4, width)))


def test_it_can_be_imported_from_where_the_readme_shows_it() -> None:
    assert autopipe.profile.profile is profile


@pytest.mark.parametrize("name", MODELS)
def test_every_call_of_the_models_can_be_timed(name: str, tmp_path: Path) -> None:
    _, _, annotated = known(name)
    found = profile(annotated, 3, folder=tmp_path)
    assert set(found.timings) == set(annotated.flows)
    assert all(t.forward_seconds > 0 for t in found.timings.values())
    assert all(t.backward_seconds >= 0 for t in found.timings.values())
    backward = {n for n, f in annotated.flows.items() if any(f.results_get_grad)}
    idle = [t.backward_seconds for n, t in found.timings.items() if n not in backward]
    assert not any(idle)
    assert found.seconds("not there") == 0


def test_calls_that_are_alike_are_run_once(tmp_path: Path) -> None:
    short, long = profile(stack(4), 4, folder=tmp_path / "a"), stack(9)
    again = profile(long, 4, folder=tmp_path / "a")
    assert again.measured == 0  # the first, the others, and their tanh are known
    assert short.measured == len({*short.timings.values()})
    assert len(again.timings) == 18


def test_measurements_are_remembered(tmp_path: Path) -> None:
    annotated = stack(2)
    first, second = (profile(annotated, 4, folder=tmp_path) for _ in range(2))
    assert first.measured > 0
    assert second.measured == 0
    assert second.timings == first.timings
    (path,) = tmp_path.iterdir()
    assert path == cache_file(device_name(CPU), tmp_path)
    assert torch.__version__.replace("+", "-") in path.name
    assert profile(annotated, 5, folder=tmp_path).measured > 0  # another size is another call


def test_a_large_product_takes_its_time(tmp_path: Path) -> None:
    """Against a stopwatch held by hand; the machine is noisy, so the bounds are wide."""
    model = nn.Linear(1024, 1024, bias=False)
    x = torch.randn(256, 1024)
    annotated = annotate(captured_of(model, x.requires_grad_()))
    (node,) = calls(annotated.captured.graph_module.graph, aten.linear.default)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        nn.functional.linear(x, model.weight)
        times.append(time.perf_counter() - start)
    timing = profile(annotated, 256, folder=tmp_path).timings[node.name]
    assert min(times) / 2 < timing.forward_seconds < 10 * max(times)
    assert timing.forward_seconds / 2 < timing.backward_seconds < 10 * timing.forward_seconds


def test_what_cannot_be_timed_is_named(tmp_path: Path) -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.cholesky(x) * 2

    x = torch.eye(3).expand(4, 3, 3).contiguous()
    annotated = annotate(captured_of(Inverse(), x))
    with pytest.raises(UnsupportedError, match="cannot be timed by itself") as caught:
        profile(annotated, 4, folder=tmp_path)  # a random matrix is not positive definite
    assert "cholesky" in str(caught.value)
    assert Path(__file__).name in str(caught.value)


def test_wrong_batches_and_devices(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without samples"):
        profile(stack(1), 0, folder=tmp_path)
    with pytest.raises(DeviceError, match="no such device here"):
        profile(stack(1), 4, "meta", folder=tmp_path)


def test_an_error_without_a_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SilentError(RuntimeError):
        def __str__(self) -> str:
            return ""

    def fail(*_: object) -> None:
        raise SilentError

    monkeypatch.setattr("autopipe.planning.profile_calls._once", fail)
    with pytest.raises(UnsupportedError, match=r"linear.*: SilentError"):
        profile(stack(1), 4, folder=tmp_path)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    found: Any = profile(stack(3, 256), 4, "cuda", folder=tmp_path)
    assert isinstance(found, Profile)
    assert found.device == torch.cuda.get_device_name()
    assert all(t.forward_seconds > 0 for t in found.timings.values())
