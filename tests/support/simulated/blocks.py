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
        nbytes: its size.
    """

    def __init__(self, machine: Machine, owner: Stream | None, what: str, nbytes: int = 0) -> None:
        self.machine, self.owner, self.what = machine, owner, what
        self.number = machine.next_block()
        self.nbytes = nbytes
        if owner is not None:
            allocate_again(owner)
            owner.memory.reclaim(machine.host_knows)
            owner.memory.take(nbytes)
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
        """Give the memory back.

        The allocator may use it again for the owner's next work, but for streams that were
        recorded, which it waits for. Memory of the host waits by itself for copies that use it.
        """
        if self.owner is None:
            return
        with self.machine.lock:
            uses = dict(self._reads)
            if self._write is not None:
                stream, tick, operator = self._write
                uses.setdefault(stream, (tick, operator))
            uses.pop(self.owner, None)
            recorded = {s: tick for s, (tick, _) in uses.items() if s in self.recorded}
            self.owner.memory.give(self.nbytes, recorded, self.machine.host_knows)
            others = {s: use for s, use in uses.items() if s not in self.recorded}
            if others:
                self.owner.freed.append((self.what, others))


def allocate_again(owner: Stream) -> None:
    """Check that the owner's next work comes after all uses of the memory that it may get."""
    for what, uses in owner.freed:
        for stream, (tick, operator) in uses.items():
            if not owner.clock.knows(stream, tick):
                owner.machine.race(
                    f"memory of {what} of {owner} is freed, and may be used again, while {operator}"
                    f" on {stream} may still use it, which was not recorded"
                )
    owner.freed.clear()
