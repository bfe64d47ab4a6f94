"""Blocks of memory, and the order of those who use them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .streams import Clock, Stream

if TYPE_CHECKING:
    from .machine import Machine


class Block:
    """Memory of a device, or pinned memory of the host, that work in streams uses.

    Args:
        machine: where it is.
        owner: the stream for which it was allocated; None: memory of the host.
        what: the operator that made it, for messages.
    """

    def __init__(self, machine: Machine, owner: Stream | None, what: str) -> None:
        self.machine, self.owner, self.what = machine, owner, what
        self.number = machine.next_block()
        self._write: tuple[Stream, int, str] | None = None
        self._reads: dict[Stream, tuple[int, str]] = {}
        self.recorded: set[Stream] = set()

    def access(
        self, clock: Clock, by: Stream | None, tick: int, operator: str, write: bool
    ) -> None:
        """Check that earlier accesses are certain to be over, and note this one.

        Args:
            clock: what is certain when the access begins.
            by: the stream; None: the host, which has ended when its call returns.
            tick: the number of the work in its stream.
            operator: for messages.
            write: whether it changes the memory.
        """
        last = [] if self._write is None else [self._write]
        if write:
            last += [(stream, n, name) for stream, (n, name) in self._reads.items()]
        for stream, n, name in last:
            if stream is not by and not clock.knows(stream, n):
                self.machine.race(
                    f"{operator} on {by or 'the host'} {'writes' if write else 'reads'} memory of"
                    f" {self.what} while {name} on {stream} may still use it"
                )
        if by is None:
            if write:
                self._write, self._reads = None, {}
        elif write:
            self._write, self._reads = (by, tick, operator), {}
        else:
            self._reads[by] = tick, operator

    def __del__(self) -> None:
        with self.machine.lock:
            self._free()

    def _free(self) -> None:
        """Give the memory back: its owner's next work may overwrite it.

        Memory of the host waits by itself for the copies that use it.
        """
        if self.owner is None:
            return
        uses = {s: (n, name) for s, (n, name) in self._reads.items()}
        if self._write is not None:
            stream, n, name = self._write
            uses.setdefault(stream, (n, name))
        clock = Clock(self.owner.clock)
        for stream, (n, name) in uses.items():
            if stream is self.owner or stream in self.recorded or clock.knows(stream, n):
                continue
            self.machine.race(
                f"memory of {self.what} of {self.owner} is freed while {name} on {stream} may"
                " still use it, which was not recorded"
            )
