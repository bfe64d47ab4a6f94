"""Without gradients, a pipeline keeps the micro-batches in transit, however many there are.

Every storage that an operator makes is watched by a weak reference, and counts for the stage that
made it for as long as it lives.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import autopipe
from autopipe.passes.schedule import KINDS, Queue
from autopipe.runtime.executor import Run

K, WIDTH, SIZE = 3, 16, 2
MODES = [torch.no_grad, torch.inference_mode]
WAIT = 60.0
"""Seconds after which a test that waits has failed."""


class Skips(nn.Module):
    """Layers, and one value that the first stage sends to the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(9))

    def forward(self, x: Tensor) -> Tensor:
        h = first = torch.tanh(self.layers[0](x))
        for layer in self.layers[1:]:
            h = torch.tanh(layer(h))
        return h + first


class Live:
    """Storages that are alive, by the stage that made them, and the most there were.

    Attributes:
        sent: likewise, those that were sent, by (value, receiving stage).
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._here = threading.local()
        self._known: set[int] = set()
        self.now: Counter[int] = Counter()
        self.most: Counter[int] = Counter()
        self.sent: Counter[tuple[str, int]] = Counter()
        self.most_sent: Counter[tuple[str, int]] = Counter()
        self.on_send: Callable[[str, int, int], None] = lambda value, to, m: None

    def enter(self, stage: int) -> None:
        self._here.stage = stage

    def made(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        with self._lock:
            if storage._cdata in self._known:
                return
            self._known.add(storage._cdata)
            self._count(self.now, self.most, self._here.stage)
        weakref.finalize(storage, self._gone, storage._cdata, self._here.stage)

    def sending(self, value: str, to: int, m: int, tensor: Tensor) -> None:
        with self._lock:
            self._count(self.sent, self.most_sent, (value, to))
        weakref.finalize(tensor, self._gone_sent, (value, to))
        self.on_send(value, to, m)

    def _count(self, now: Counter[Any], most: Counter[Any], key: Any) -> None:
        now[key] += 1
        most[key] = max(most[key], now[key])

    def _gone(self, address: int, stage: int) -> None:
        with self._lock:
            self._known.discard(address)
            self.now[stage] -= 1

    def _gone_sent(self, key: tuple[str, int]) -> None:
        with self._lock:
            self.sent[key] -= 1


class Watch(TorchDispatchMode):
    """Tells of each storage that an operator makes; workers run in the caller's modes."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in given:
                self.live.made(value)
        return result


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Live:
    found = Live()
    work, context, send = Run._work, Run.context, Run.send

    def working(run: Run, *args: Any) -> None:
        with Watch(found):
            work(run, *args)

    def entering(run: Run, stage: int, m: int, *args: Any) -> Any:
        found.enter(stage)
        return context(run, stage, m, *args)

    def sending(run: Run, value: str, source: int, to: int, m: int, tensor: Tensor) -> None:
        found.sending(value, to, m, tensor)
        send(run, value, source, to, m, tensor)

    monkeypatch.setattr(Run, "_work", working)
    monkeypatch.setattr(Run, "context", entering)
    monkeypatch.setattr(Run, "send", sending)
    return found


def compiled(M: int, kind: str) -> tuple[autopipe.Pipeline, Tensor]:
    x = torch.randn(SIZE * M, WIDTH)
    pipe = autopipe.compile(Skips().eval(), K, M, schedule=kind)
    with torch.no_grad():
        pipe(x)
    return pipe, x


def queues(pipe: autopipe.Pipeline) -> Mapping[Queue, int]:
    _, ready = pipe._programs.last
    return ready.lowered.queues


@pytest.mark.few(4)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_alive_is_in_transit(
    kind: str, mode: Callable[[], AbstractContextManager[Any]], live: Live
) -> None:
    """Of each value: what its queue holds, one that is to be sent, and one that is being used."""
    capacities = []
    for M in (12, 24):
        pipe, x = compiled(M, kind)
        live.most.clear()
        live.most_sent.clear()
        with mode():
            result = pipe(x)
        assert result.shape == x.shape
        found = queues(pipe)
        capacities.append(found)
        for (value, source, to), capacity in found.items():
            assert 0 < live.most_sent[value, to] <= capacity + 2, (value, source, to)
        last = len(pipe.stages) - 1
        for k in range(len(pipe.stages)):
            transit = sum(n + 2 for queue, n in found.items() if queue.source == k)
            within = 2  # what an operator reads, and what it makes
            assert 0 < live.most[k] <= transit + within + M * (k == last), k
        assert not +live.now
        assert not +live.sent
    assert capacities[0] == capacities[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("M", [12, 24])
def test_a_device_that_is_late_holds_the_others_up(
    M: int,
    mode: Callable[[], AbstractContextManager[Any]],
    live: Live,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last stage begins when all the others wait: no more than this is ever alive."""
    pipe, x = compiled(M, "gpipe")
    found = queues(pipe)
    skip, near, after = sorted(found, key=lambda q: (q.source, -q.to))
    assert [(q.source, q.to) for q in (skip, near, after)] == [(0, 2), (0, 1), (1, 2)]
    assert [found[q] for q in (skip, near, after)] == [3, 2, 2]
    stuck = {(skip.value, 2, 3): threading.Event(), (after.value, 2, 2): threading.Event()}

    def on_send(value: str, to: int, m: int) -> None:
        if (value, to, m) in stuck:
            stuck[value, to, m].set()

    seen: dict[str, Any] = {}
    receive = Run.receive

    def receiving(run: Run, value: str, stage: int, m: int) -> Tensor:
        if stage == 2 and m == 0 and not seen:
            assert all(event.wait(WAIT) for event in stuck.values())
            seen["sent"], seen["made"] = dict(+live.sent), dict(+live.now)
        return receive(run, value, stage, m)

    live.on_send = on_send
    monkeypatch.setattr(Run, "receive", receiving)
    with mode():
        pipe(x)
    # Queues are full, and each sender holds the results of the micro-batch that it cannot send.
    assert seen["sent"] == {(skip.value, 2): 3 + 1, (after.value, 2): 2 + 1}
    assert seen["made"] == {0: 3 + 2, 1: 2 + 1}


class Head(nn.Module):
    """Returns the first row of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.layers(x)
        return h[:, 0], x[:, 1]


@pytest.mark.parametrize("mode", MODES)
def test_a_result_that_is_a_part_does_not_keep_the_whole(
    mode: Callable[[], AbstractContextManager[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every micro-batch's last hidden states would live until the end of the call."""
    M, rows = 12, 8
    kept = []
    add = Run.return_to_caller

    def adding(run: Run, value: str, m: int, tensor: Tensor) -> None:
        add(run, value, m, tensor)
        kept.append(run.results[value, m].untyped_storage().nbytes())

    monkeypatch.setattr(Run, "return_to_caller", adding)
    model, x = Head().eval(), torch.randn(SIZE * M, rows, WIDTH)
    pipe = autopipe.compile(model, K, M)
    with mode():
        first, own = pipe(x)
        torch.testing.assert_close(first, model(x)[0])
        assert torch.equal(own, x[:, 1])
    part = SIZE * WIDTH * 4
    assert kept == [part, x.nbytes] * M  # the second is a part of the caller's batch
