"""The order between workers and the streams of the pipeline's caller."""

from __future__ import annotations

import pytest
import torch

from autopipe.runtime.backends import BACKENDS
from autopipe.runtime.caller_streams import CallerStreams
from autopipe.runtime.transfer import SentTensor, WorkerDevice
from tests.support.recording import RecordingBackend

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> RecordingBackend:
    """CPU is a device type with streams, meta is one without."""
    backend = RecordingBackend()
    monkeypatch.setitem(BACKENDS, "cpu", backend)
    return backend


def test_what_was_queued_before_is_marked(backend: RecordingBackend) -> None:
    caller = CallerStreams([CPU, META, CPU])
    (event,) = caller.events(CPU)
    assert backend.streams["default"].entries == [("event", event)]
    assert caller.events(META) == ()


def test_on_a_side_stream_the_default_one_is_ordered_too(backend: RecordingBackend) -> None:
    side, default = backend.new_stream(CPU), backend.streams["default"]
    with backend.use_stream(side):
        caller = CallerStreams([CPU])
    assert [e.stream for e in caller.events(CPU)] == [side, default]
    worker = WorkerDevice(CPU)
    caller.wait_for([worker])
    assert side.waited_for() == default.waited_for() == [worker.compute.name]
    tensor = torch.ones(2)
    caller.use([tensor, torch.ones(2, device=META)])
    for stream in (side, default):
        assert stream.entries[-1] == ("use", tensor)


def test_the_caller_waits_for_copies_too(backend: RecordingBackend) -> None:
    """They may still read its tensors."""
    worker = WorkerDevice(META)
    lane = worker.lane(CPU, META)
    CallerStreams([CPU]).wait_for([worker])
    assert backend.streams["default"].waited_for() == [lane.out.name]


def test_the_host_waits_for_what_it_gets_itself(backend: RecordingBackend) -> None:
    worker = WorkerDevice(CPU)
    here = SentTensor(torch.ones(2), worker.compute.record_event())
    host = SentTensor(torch.ones(2, device=META), worker.compute.record_event())
    CallerStreams([CPU, META]).wait_on_host([here, SentTensor(torch.ones(2), None)])
    assert backend.log == []
    CallerStreams([CPU, META]).wait_on_host([here, host])
    assert backend.log == [("host waits", worker.compute.name)]
