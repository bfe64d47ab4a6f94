"""What makes a pipeline capture or trace again, and what does not.

Covers autopipe/compiled.py.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe import program_cache
from autopipe.errors import OptionError
from autopipe.passes.phases import cut
from tests.support.phased import Layers

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Counts:
    """How often models are captured, and which stages are traced, from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures, self.traces = 0, list[tuple[Any, ...]]()
        self.graphs: list[weakref.ref[Any]] = []
        capture_with_costs, trace = program_cache.capture_with_costs, cut.trace_joint

        def counting_captures(*args: Any) -> Any:
            self.captures += 1
            return capture_with_costs(*args)

        def counting_traces(stage: Any, inputs: Any, tangents: Any, *args: Any, **kw: Any) -> Any:
            self.traces.append((stage.fingerprint, tuple(inputs), tuple(tangents)))
            joint = trace(stage, inputs, tangents, *args, **kw)
            self.graphs.append(weakref.ref(joint))
            return joint

        monkeypatch.setattr(program_cache, "capture_with_costs", counting_captures)
        monkeypatch.setattr(cut, "trace_joint", counting_traces)

    def new(self) -> tuple[int, int]:
        """Captures and traces since the last time."""
        found = self.captures, len(self.traces)
        self.captures, self.traces = 0, []
        return found


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


class Loss(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


def test_the_traces_of_the_search_are_used(counts: Counts) -> None:
    """Each distinct stage is traced once, in the search; the pipeline itself traces none."""
    model, x = Loss(6), torch.randn(64, 6)
    pipe = autopipe.compile(model, ["cpu"] * 2, remat="auto", memory="1GiB", args=(x,))
    assert len(counts.traces) > 2  # several numbers of micro-batches were tried
    assert len(set(counts.traces)) == len(counts.traces)
    counts.new()
    pipe(x).backward()
    assert counts.new() == (0, 0)
    with torch.no_grad():
        pipe(x)
    assert counts.new() == (0, 2)  # for inference


@pytest.mark.full
def test_joint_graphs_of_other_candidates_are_freed(counts: Counts) -> None:
    model, x = Loss(6), torch.randn(64, 6)
    pipe = autopipe.compile(model, ["cpu"] * 2, remat="auto", memory="1GiB", args=(x,))
    gc.collect()
    assert counts.graphs
    assert [ref for ref in counts.graphs if ref() is not None] == []
    assert len(pipe._programs.last[0].programs._stages._traces.stages) == 2


def test_batch_sizes_are_captured_once_and_traced_once_per_micro_batch_size(
    counts: Counts,
) -> None:
    pipe = autopipe.compile(Layers(2), ["cpu"] * 2, 2)
    pipe(X)
    assert counts.new() == (1, 2)
    pipe(X * 2)
    assert counts.new() == (0, 0)
    pipe(X[:6])
    assert counts.new() == (0, 2)
    pipe(X[:7])  # 4 and 3 samples, both known
    assert counts.new() == (0, 0)


def test_what_the_key_of_a_program_tells_apart(counts: Counts) -> None:
    model = Layers(2)
    pipe = autopipe.compile(model, ["cpu"] * 2, 2, args=(X,))
    first = pipe._programs.last[1]
    assert counts.new() == (1, 2)
    with torch.no_grad():
        pipe(X)
    assert counts.new() == (0, 1)  # without gradients the stages are alike
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pipe(X)
    assert counts.new() == (0, 2)
    model.layers[0].requires_grad_(False)
    pipe(X)
    assert counts.new()[0] == 0
    model.layers[0].requires_grad_(True)
    pipe(X)
    assert counts.new() == (0, 0)
    assert pipe._programs.last[1] is first


def test_a_changed_model_is_captured_again(counts: Counts) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6))
    pipe = autopipe.compile(model, ["cpu"] * 2, 2, args=(X,))
    assert counts.new()[0] == 1
    model[1].p = 0.25
    pipe(X)
    assert counts.new()[0] == 1
    pipe.eval()
    pipe(X)
    assert counts.new()[0] == 1
    pipe.train()
    pipe(X)
    assert counts.new() == (0, 0)


def test_static_shapes_are_captured_apart(counts: Counts) -> None:
    pipe = autopipe.compile(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), ["cpu"], 2)
    for length in (3, 4, 3):
        pipe(torch.randn(8, length, 6))
    assert counts.captures == 2


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return torch.tanh(x) * scale


def test_another_structure_is_captured_with_a_warning() -> None:
    pipe = autopipe.compile(Scaled(), ["cpu"], 2, args=(X,))
    with pytest.warns(UserWarning, match=r"arguments: .* → .*scale=3\.0"):
        assert torch.equal(pipe(X, scale=3.0), torch.tanh(X) * 3)
    assert torch.equal(pipe(X), torch.tanh(X) * 2)


def test_a_capture_that_was_asked_for_does_not_warn() -> None:
    pipe = autopipe.compile(Scaled(), ["cpu"], 2, args=(X,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (3.0, 4.0, 5.0, 6.0):
            pipe.capture(X, scale=scale)
            assert torch.equal(pipe(X, scale=scale), torch.tanh(X) * scale)


def test_the_fourth_capture_says_why() -> None:
    """Three come with a mode and a length; a fourth that a call causes is worth a look."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    pipe = autopipe.compile(model, ["cpu"], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            model.temperature = float(step)  # type: ignore[assignment]
            pipe(X)
    model.temperature = -1.0  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="captured 4 times") as caught:
        pipe(X)
    text = str(caught[0].message)
    assert "attribute temperature of Sequential: 2.0 → -1.0" in text
    assert "autopipe.explain_captures(pipe)" in text
    model.temperature = -2.0  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(X)  # said once


def test_a_chosen_plan_is_shared_between_modes() -> None:
    pipe = autopipe.compile(Layers(4), ["cpu"] * 2, remat="auto", args=(X,))
    training = pipe._programs.last[0].options
    assert pipe._programs.options == training
    pipe.eval()
    with torch.no_grad():
        pipe(X)
    evaluation = pipe._programs.last[0].options
    assert (evaluation.chunks, evaluation.remat) == (training.chunks, training.remat)


def test_other_outputs_with_gradients_get_a_program_of_their_own(counts: Counts) -> None:
    class Two(Layers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            first = torch.tanh(self.layers[0](x))
            return first, torch.tanh(self.layers[1](first))

    pipe = autopipe.compile(Two(2), ["cpu"] * 2, 2)
    pipe(X)[0].sum().backward()
    compiled, program = pipe._programs.last
    first = compiled.split.captured.outputs[0].name
    assert program.differentiated != {first}
    assert compiled.expected == {first}
    counts.new()
    pipe(X)[0].sum().backward()  # the next call expects the same gradients
    assert counts.new() == (0, 0)
    assert pipe._programs.last[1].differentiated == {first}


def test_backward_outside_of_autocast_traces_under_the_forwards() -> None:
    class Two(Layers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return self.layers[0](x), self.layers[1](x)

    model = Two(2)
    pipe = autopipe.compile(model, ["cpu"] * 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = pipe(X)[0]
    result.float().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.zero_grad()
        inside = model.layers[0](X)
        program = pipe._programs.last[0].programs._programs
    assert inside.dtype is result.dtype is torch.bfloat16
    assert {key.autocast[0] for key in program} == {(True, torch.bfloat16)}


def test_nothing_compiled_yet() -> None:
    with pytest.raises(OptionError, match="nothing has been compiled yet"):
        _ = autopipe.compile(Layers(2), ["cpu"] * 2, 2).plan


@pytest.mark.parametrize(("width", "shares"), [(4, True), (512, False)])
def test_workers_share_a_core_where_operators_are_small(width: int, shares: bool) -> None:
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    pipe = autopipe.compile(model, ["cpu"] * 2, 2, args=(torch.randn(256, width),))
    _, ready = pipe._programs.last
    assert ready.program.shares_core == shares
