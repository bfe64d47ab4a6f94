"""Handing tensors over: what is copied, and which streams wait for which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autopipe
from autopipe.runtime import transfer
from autopipe.runtime.backends import BACKENDS
from autopipe.runtime.backends.cpu import CpuBackend
from tests.support.agreement import assert_agrees, pipelined
from tests.support.early_schedules import Layers, batch
from tests.support.recording import RecordingBackend

CPU, META = torch.device("cpu"), torch.device("meta")

ONE = torch.randn(4, 1, 6)
UNCHANGED = {
    "the same strides": (torch.randn(4, 6), (6, 1)),
    "transposed, as expected": (torch.randn(6, 4).t(), (1, 4)),
    "other strides where there is one only": (ONE, (6, 999, 1)),
    "one sample": (torch.randn(1, 6), (77, 1)),
    "no dimensions": (torch.tensor(3.0), ()),
    "expanded, as expected": (torch.randn(1, 6).expand(4, 6), (0, 1)),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_tensor_that_fits_is_handed_on_as_it_is(name: str) -> None:
    tensor, strides = UNCHANGED[name]
    assert transfer.with_strides(tensor, strides) is tensor


CHANGED = {
    "transposed": (torch.randn(4, 6), (1, 4)),
    "made dense": (torch.randn(6, 4).t(), (6, 1)),
    "every second": (torch.randn(4, 12)[:, ::2], (6, 1)),
    "expanded before": (torch.randn(1, 6).expand(4, 6), (6, 1)),
    "channels last": (torch.randn(2, 3, 4, 5), (60, 1, 15, 3)),
    "integers": (torch.arange(24).view(4, 6), (1, 4)),
    "halves": (torch.randn(4, 6).half(), (1, 4)),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_tensor_that_does_not_fit_is_copied(name: str) -> None:
    tensor, strides = CHANGED[name]
    before = tensor.clone()
    found = transfer.with_strides(tensor, strides)
    assert found.stride() == strides
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)
    found.zero_()
    assert torch.equal(tensor, before)


def test_between_workers_on_the_cpu_nothing_is_copied() -> None:
    worker = transfer.WorkerDevice(CPU)
    assert worker.compute is None
    tensor = torch.randn(4, 6)
    sent = transfer.send(tensor, worker, worker)
    assert sent.ready is None
    assert transfer.receive(sent, worker) is tensor


def test_to_another_device_a_copy_is_sent() -> None:
    tensor = torch.randn(4, 6)
    sent = transfer.send(
        tensor, transfer.WorkerDevice(CPU), transfer.WorkerDevice(torch.device("meta"))
    )
    assert sent.tensor.is_meta
    assert sent.tensor.shape == tensor.shape


# ------------------------------------------------------------------------------- streams


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordingBackend:
    """CPU and meta are device types with streams."""
    backend = RecordingBackend()
    for name in ("cpu", "meta"):
        monkeypatch.setitem(BACKENDS, name, backend)
    return backend


@pytest.mark.usefixtures("recorded")
def test_on_one_device_the_receiver_waits_for_the_sender() -> None:
    source, target = transfer.WorkerDevice(CPU), transfer.WorkerDevice(CPU)
    tensor = torch.randn(4, 6)
    sent = transfer.send(tensor, source, target)
    assert sent.tensor is tensor
    assert transfer.receive(sent, target) is tensor
    assert source.compute.entries == [("event", sent.ready)]
    assert target.compute.entries == [("wait", sent.ready), ("use", tensor)]
    assert len(list(source.streams())) == len(list(target.streams())) == 1  # no lane


@pytest.mark.usefixtures("recorded")
def test_two_stages_of_one_worker_wait_for_nothing() -> None:
    worker, tensor = transfer.WorkerDevice(CPU), torch.randn(4, 6)
    sent = transfer.send(tensor, worker, worker)
    assert sent == (tensor, None)
    assert transfer.receive(sent, worker) is tensor
    assert worker.compute.waited_for() == []
    assert len(list(worker.streams())) == 1


@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("kind", ["interleaved", "zb-v"])
def test_stages_of_one_device_share_its_worker(
    kind: str, remat: str, recorded: RecordingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between them a tensor is handed on; each worker has one stream."""
    own, send = [], transfer.send

    def sending(tensor: Tensor, source: Any, target: Any) -> transfer.SentTensor:
        sent = send(tensor, source, target)
        if source is target:
            own.append(sent.tensor is tensor)
        return sent

    monkeypatch.setattr(transfer, "send", sending)
    model, inputs = Layers(4), batch()
    pipe = autopipe.compile(model, devices=2, chunks=4, schedule=kind, remat=remat)
    pipe(*inputs).backward()
    assert len(pipe.stages) == 4
    assert len(recorded.streams) == 1 + 2
    # With interleaved, the next stage is always on the other device.
    assert own == [True] * (2 * 4 if kind == "zb-v" else 0)


@pytest.mark.usefixtures("recorded")
def test_a_copy_has_streams_of_its_own_on_both_devices() -> None:
    source, target = transfer.WorkerDevice(CPU), transfer.WorkerDevice(META)
    tensor = torch.randn(4, 6)
    sent = transfer.send(tensor, source, target)
    ((_, computed),) = source.compute.entries
    lane = source.lane(CPU, META)
    assert lane.out.entries == [("wait", computed), ("use", tensor), ("event", sent.ready)]
    assert lane.into.entries == []  # ATen waits for it, and lets it wait
    assert [s for _, s in source.streams()] == [source.compute, lane.out, lane.into]
    found = transfer.receive(sent, target)
    assert found.is_meta
    assert target.compute.entries == [("wait", sent.ready), ("use", found)]
    transfer.send(tensor, source, target)
    assert [s for _, s in source.streams()] == [source.compute, lane.out, lane.into]


def test_the_host_waits_for_what_a_device_with_streams_sends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = transfer.WorkerDevice(torch.device("meta"))
    backend = RecordingBackend()
    monkeypatch.setitem(BACKENDS, "cpu", backend)
    source = transfer.WorkerDevice(CPU)
    found = transfer.receive(transfer.send(torch.randn(4, 6), source, host), host)
    assert found.is_meta
    assert backend.log == [("host waits", source.lane(CPU, META).out.name)]


def test_a_host_sends_on_a_stream_of_the_receivers_device(monkeypatch: pytest.MonkeyPatch) -> None:
    host = transfer.WorkerDevice(CPU)
    backend = RecordingBackend("meta")
    monkeypatch.setitem(BACKENDS, "meta", backend)
    target = transfer.WorkerDevice(META)
    sent = transfer.send(torch.randn(4, 6), host, target)
    assert host.lane(CPU, META).into.entries == [("event", sent.ready)]
    assert backend.streams["default"].entries == []
    found = transfer.receive(sent, target)
    assert target.compute.entries == [("wait", sent.ready), ("use", found)]


def test_the_callers_tensors(recorded: RecordingBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = transfer.WorkerDevice(CPU), transfer.WorkerDevice(META)
    tensor, caller = torch.randn(4, 6), recorded.new_stream(CPU)
    # On the worker's device: used as it is.
    assert transfer.fetch_from_caller(tensor, here, ()) is tensor
    assert here.compute.entries == []
    # On another one: copied behind the caller's work there, and nothing of the caller's waits.
    computed = caller.record_event()
    found = transfer.fetch_from_caller(tensor, there, [computed])
    assert found.is_meta
    wait, used, (_, ready) = there.lane(CPU, META).out.entries
    assert (wait, used) == (("wait", computed), ("use", tensor))
    assert there.compute.entries == [("wait", ready), ("use", found)]
    assert caller.entries == [("event", computed)]
    # On a device without streams: copied on a stream of the worker's device.
    monkeypatch.setitem(BACKENDS, "cpu", CpuBackend())
    other = transfer.WorkerDevice(META)
    assert transfer.fetch_from_caller(tensor, other, ()).is_meta
    ((_, ready),) = other.lane(CPU, META).into.entries
    assert other.compute.entries[0] == ("wait", ready)


@pytest.mark.usefixtures("recorded")
def test_results_leave_behind_the_work_of_their_stage() -> None:
    first, second = transfer.WorkerDevice(CPU), transfer.WorkerDevice(CPU)
    tensor = torch.randn(4, 6)
    assert transfer.send_to_caller(tensor, CPU, [first, second]) == (tensor, None)
    with second.backend.use_stream(second.compute):
        sent = transfer.send_to_caller(tensor, META, [first, second])
    assert sent.tensor.is_meta
    ((_, computed),) = second.compute.entries
    lane = second.lane(CPU, META)
    assert lane.out.entries == [("wait", computed), ("use", tensor), ("event", sent.ready)]
    assert first.compute.entries == []
    # A tensor that no worker has computed, such as a number of the host.
    assert transfer.send_to_caller(tensor, META, []).ready is None


# ------------------------------------------------------------------------------- in a pipeline


class Odd(torch.nn.Module):
    """What crosses between its stages is transposed, strided or expanded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.cat([x, x * 2], 1)[:, ::2].t()
        x = x[:, :, None].expand(-1, -1, 3).transpose(0, 1)
        return self.last(x.transpose(1, 2).tanh()).sum(1)


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 5, 6, 7])
def test_boundary_tensors_may_have_any_strides(devices: int) -> None:
    pipe = pipelined(Odd().double(), devices=devices)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    found = assert_agrees(pipe, x)
    assert found.shape == (7, 6)


@pytest.mark.gpu
def test_streams_between_stages_on_one_gpu() -> None:
    gpu = torch.device("cuda", 0)
    source, target = transfer.WorkerDevice(gpu), transfer.WorkerDevice(gpu)
    assert source.compute is not None
    with torch.cuda.stream(source.compute):
        tensor = torch.randn(1000, 1000, device=gpu)
        product = tensor @ tensor
        sent = transfer.send(product, source, target)
    assert sent.tensor is product
    assert sent.ready is not None
    assert target.compute is not None
    with torch.cuda.stream(target.compute):
        total = transfer.receive(sent, target).sum()
    torch.cuda.synchronize()
    torch.testing.assert_close(total, (tensor @ tensor).sum())


@pytest.mark.gpu
def test_from_a_gpu_to_the_cpu_and_back() -> None:
    gpu, cpu = transfer.WorkerDevice(torch.device("cuda", 0)), transfer.WorkerDevice(CPU)
    assert gpu.compute is not None
    with torch.cuda.stream(gpu.compute):
        tensor = torch.randn(1000, 1000, device=gpu.device)
        sent = transfer.send(tensor * 2, gpu, cpu)
    arrived = transfer.receive(sent, cpu)
    assert torch.equal(arrived, (tensor * 2).cpu())
    back = transfer.send(arrived, cpu, gpu)
    with torch.cuda.stream(gpu.compute):
        again = transfer.receive(back, gpu) / 2
    torch.cuda.synchronize()
    assert torch.equal(again, tensor)
