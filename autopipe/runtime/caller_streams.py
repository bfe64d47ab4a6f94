"""`CallerStreams`: the order between a pipeline's workers and the streams of its caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .backends import backend_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch import Tensor

    from .backends import Event, Stream
    from .transfer import SentTensor, WorkerDevice


class CallerStreams:
    """The streams that the calling thread works on when a run begins.

    On each device these are its current stream and the default one. Autograd's engine calls a
    backward in a thread of its own. It takes for granted that gradients from or for another device
    than that of the pipeline's result are computed on that device's default stream.

    The streams of an earlier run of the same step wait, too: what the caller allocated on them for
    the forward is freed when the backward is over, whatever stream it is called on.

    Args:
        devices: of the workers and of the caller's tensors.
        earlier: of the earlier run.
    """

    def __init__(
        self, devices: Iterable[torch.device], earlier: CallerStreams | None = None
    ) -> None:
        self._streams: dict[torch.device, list[Stream]] = {}
        for device in dict.fromkeys(devices):
            backend = backend_of(device)
            current, default = backend.current_stream(device), backend.default_stream(device)
            found = [s for s in (current, default) if s is not None]
            if found:
                self._streams[device] = found if current != default else found[:1]
        self._events = {
            d: [s.record_event() for s in streams] for d, streams in self._streams.items()
        }
        self._waiting = dict(self._streams)
        for device, streams in ({} if earlier is None else earlier._waiting).items():
            own = self._waiting.get(device, [])
            self._waiting[device] = own + [s for s in streams if s not in own]

    def events(self, device: torch.device) -> Sequence[Event]:
        """What the caller had queued on a device when the run began."""
        return self._events.get(device, ())

    def wait_for(self, workers: Iterable[WorkerDevice]) -> None:
        """Let the caller's later work wait for all that workers have queued."""
        for worker in workers:
            for device, stream in worker.streams():
                for own in self._waiting.get(device, ()):
                    own.wait_stream(stream)

    def wait_on_host(self, results: Iterable[SentTensor]) -> None:
        """Let the calling thread wait for results that it can read without a stream.

        Args:
            results: that workers have sent.
        """
        for tensor, ready in results:
            if ready is not None and tensor.device not in self._streams:
                ready.synchronize()

    def use(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of tensors until the caller's work on them is done."""
        for tensor in tensors:
            for stream in self._streams.get(tensor.device, ()):
                backend_of(tensor.device).record_use(tensor, stream)
