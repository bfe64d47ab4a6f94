"""Parts of `benchmarks.gpu` about the order of work: hidden waits of the host, and side streams."""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import autopipe
from benchmarks.gpu_device import Card, refused, slow_stages
from benchmarks.gpu_setting import Setting, Step, pipelined, training

SCHEDULES = ("gpipe", "1f1b", "zb-h1")
PLACES = ("cpu", "pinned", "device")
STREAMS = ("default", "side", "forward on side")
CHUNKS = 4
Found = dict[str, Tensor]
"""What a step gives, in the host's memory."""


# ------------------------------------------------------------------------------------------- sync


def sync(setting: Setting) -> None:
    """Warm steps in which the host may not wait for the device: each schedule, 1, 2, 4 stages."""
    card = setting.card
    if card.has_streams:  # that such a wait is seen at all
        one = card.put(torch.ones(1))
        for what, wait in (
            ("a value read", one.item),
            ("a value read in another thread", lambda: in_another_thread(one.item)),
            ("synchronize", card.synchronize),
            ("an event", lambda: card.current_stream().record_event().synchronize()),
        ):
            found = waits(card, wait)
            setting.check(f"a wait that is there is seen: {what}", [] if found else ["not seen"])
    model, inputs = setting.gpt2(layers=4, sequence=256)
    batch = inputs(CHUNKS)
    for stages in (1, 2) if setting.tiny else (1, 2, 4):
        for kind in SCHEDULES[-1:] if setting.tiny else SCHEDULES:
            what = f"no wait of the host, {stages} stages, {kind}"
            with setting.guarded(what):
                pipe = pipelined(setting, model, batch, stages, CHUNKS, schedule=kind, remat="none")
                step = training(pipe, model, batch)
                for _ in range(2):
                    step()
                faults = waits(card, step)
                setting.check(what, faults)


def waits(card: Card, step: Any) -> list[str]:
    """Where a warm step made the host wait: the innermost frames, or nothing."""
    try:
        with card.waits_are_errors():
            step()
    except Exception as error:
        return [where(error)]
    return []


def in_another_thread(run: Callable[[], Any]) -> None:
    """Call a function in a thread, and raise what it raises."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


def where(error: BaseException) -> str:
    """The innermost frames of what caused an error in the first place."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = [
        f"{frame.filename}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.name != refused.__name__
    ]
    return f"{error}, at" + "".join(f"\n    {frame}" for frame in reversed(frames[-16:]))


# ----------------------------------------------------------------------------------- side streams


class Layers(nn.Module):
    """Layers whose kernels add in a fixed order."""

    def __init__(self, width: int, count: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * mask
        return x


class Way(NamedTuple):
    """How the caller calls.

    Attributes:
        place: of its tensors.
        streams: that it works on.
        trains: or a call without gradients, after which it overwrites its tensors at once.
    """

    place: str
    streams: str
    trains: bool

    def __str__(self) -> str:
        kind = "training" if self.trains else "no_grad"
        return f"inputs {self.place}, streams {self.streams}, {kind}"


def side_streams(setting: Setting) -> None:
    """Any place and any stream gives the bits of the default stream, with kernels that sleep."""
    card, width = setting.card, 8 if setting.tiny else 512
    repeats = 2 if setting.tiny else 30
    torch.manual_seed(0)
    model = Layers(width)
    card.place(model)
    data = [torch.randn(2 * CHUNKS, width), (torch.rand(2 * CHUNKS, width) > 0.3).float()]
    with deterministic(), setting.guarded("side streams"):
        pipe = autopipe.compile(model, [setting.device] * 4, CHUNKS, remat="full")
        truth = {t: step(card, pipe, data, Way("device", "default", t)) for t in (True, False)}
        setting.check("beside plain torch", unlike(truth[True], plain(card, model, data), 1e-5))
        for way in (Way(p, s, t) for p in PLACES for s in STREAMS for t in (True, False)):
            faults: dict[str, None] = {}
            chance = random.Random(str(way))
            with slow_stages(card, lambda chance=chance: chance.choice((0, 0, 0.2, 1))):  # type: ignore[misc]
                for _ in range(repeats):
                    faults.update(
                        dict.fromkeys(unlike(step(card, pipe, data, way), truth[way.trains]))
                    )
            setting.check(str(way), [*faults, *card.races()])
        given = [card.put(t) for t in data]
        for what, run in (
            ("a forward returns early", lambda: pipe(*given)),
            ("a step returns early", lambda: pipe(*given).sum().backward()),
        ):
            setting.check(what, blocked(card, run))


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels add in a fixed order, where torch has such kernels."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS begins
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32 = before


def given(card: Card, tensor: Tensor, place: str) -> Tensor:
    """A copy of the caller's data; on the device it is written only after a kernel that sleeps."""
    if place != "device":
        return card.pinned(tensor) if place == "pinned" else tensor.clone()
    source = card.put(tensor)
    late = torch.full_like(source, torch.nan)
    card.sleep(2)
    return late.copy_(source)


def step(card: Card, pipe: autopipe.Pipeline, data: list[Tensor], way: Way) -> Found:
    """A call, and perhaps its backward, after which the caller overwrites its tensors."""
    pipe.zero_grad(set_to_none=True)
    before, side = card.current_stream(), card.new_stream()
    other = side is not None and way.streams != "default"
    if other:
        side.wait_stream(before)
    of_forward = side if other else before
    with card.use(of_forward), torch.set_grad_enabled(way.trains):
        x, mask = (given(card, t, way.place) for t in data)
        x.requires_grad_(way.trains)
        result = pipe(x, mask)
        found = {"result": result.detach().clone()}
        loss = result.square().sum()
        if way.trains and way.streams != "forward on side":
            card.backward(loss, of_forward)
    if way.trains and way.streams == "forward on side":
        card.backward(loss, of_forward)
    with torch.no_grad(), card.use(before if way.streams == "forward on side" else of_forward):
        if way.trains:
            assert x.grad is not None
            found["gradient of x"] = x.grad.clone()
        if other and way.streams == "forward on side":
            before.wait_stream(side)
        for tensor in (x, mask):
            tensor.fill_(torch.nan)
    if other:
        before.wait_stream(side)
    grads = {n: p.grad for n, p in pipe.named_parameters() if p.grad is not None}
    values = {name: card.values(t) for name, t in {**found, **grads}.items()}
    card.synchronize()
    return values


def plain(card: Card, model: nn.Module, data: list[Tensor]) -> Found:
    """The model itself, one micro-batch after the other, on the default stream."""
    model.zero_grad(set_to_none=True)
    x, mask = (card.put(t.clone()) for t in data)
    x.requires_grad_()
    parts = zip(x.chunk(CHUNKS), mask.chunk(CHUNKS), strict=True)
    result = torch.cat([model(a, b) for a, b in parts])
    result.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    found = {"result": result, "gradient of x": x.grad, **grads}
    return {name: card.values(t) for name, t in found.items() if t is not None}


def unlike(found: Found, truth: Found, tolerance: float = 0.0) -> list[str]:
    """What differs, of the largest value by more than a tolerance; by bits if that is zero."""
    faults = [f"{name} is missing" for name in truth.keys() - found.keys()]
    for name, expected in truth.items():
        ours = found.get(name, expected)
        if tolerance == 0 and not torch.equal(ours, expected):
            faults.append(f"{name} differs: {(ours != expected).sum()} of {ours.numel()} values")
        elif tolerance and not (ours - expected).abs().max() <= tolerance * expected.abs().max():
            faults.append(f"{name} differs by {(ours - expected).abs().max():.1e}")
    return faults


def blocked(card: Card, run: Step) -> list[str]:
    """Whether a call with tensors on the device waited for the device."""
    if not card.has_streams:
        return []
    run()
    card.synchronize()
    card.sleep(300)
    run()
    early = not card.is_idle(card.current_stream())
    card.synchronize()
    return [] if early else ["the host went on only when the device had finished"]
