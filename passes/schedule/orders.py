"""The orders of micro-batches that the literature knows, one function per family.

Each gives, per device, what it does in a step as (letters, stage, micro-batch): letters "F", "B"
and "W", or "BW" where the gradients of inputs and of parameters are made in one go. None needs to
know how long anything takes. `schedule` adds rematerialization and picks the family.

Letters in formulas: K devices, M micro-batches, v stages per device, so vK stages in all. Every
order here runs micro-batches 0..M-1 backward in that order, at each stage.

Two families are only defined for some M. There the order is made for more micro-batches than there
are, and the surplus is left out: micro-batches do not wait for one another but through the order of
a device, so what is left of a sound order is sound.
"""

from __future__ import annotations

from collections.abc import Iterator

RawAction = tuple[str, int, int]
"""Letters of the phases, stage, micro-batch."""


def gpipe(K: int, M: int) -> list[list[RawAction]]:
    """All micro-batches forward, then all backward (arXiv 1811.06965, section 2.2)."""
    return [[(letters, k, m) for letters in ("F", "BW") for m in range(M)] for k in range(K)]


def interleaved(K: int, M: int, v: int) -> list[list[RawAction]]:
    """One forward, one backward in turn, once the pipeline is full; stage s on device s mod K.

    With v = 1 this is PipeDream-Flush, or 1F1B (arXiv 2006.09503, section 2.2): device k is K-1-k
    forwards ahead. With v > 1 (arXiv 2104.04473, section 2.2) a device takes K micro-batches
    through one of its stages, then the same K through its next one, and is 2(K-1-k) + (v-1)K
    forwards ahead; M is rounded up to a multiple of K and the surplus left out.
    """
    rounded = M if v == 1 else -(-M // K) * K
    group = M if v == 1 else K
    starts = range(0, rounded, group)
    turns = [(c, start + i) for start in starts for c in range(v) for i in range(group)]
    rows = []
    for k in range(K):
        forwards = [("F", c * K + k, m) for c, m in turns]
        backwards = [("BW", (v - 1 - c) * K + k, m) for c, m in turns]
        ahead = K - 1 - k if v == 1 else 2 * (K - 1 - k) + (v - 1) * K
        rows.append([step for step in _alternate(forwards, backwards, ahead) if step[2] < M])
    return rows


def _alternate(
    forwards: list[RawAction], backwards: list[RawAction], ahead: int
) -> Iterator[RawAction]:
    """`ahead` forwards, then one forward and one backward in turn, then what is left."""
    yield from forwards[:ahead]
    for i, backward in enumerate(backwards):
        yield from forwards[ahead + i : ahead + i + 1]
        yield backward


def zero_bubble(K: int, M: int, h: int) -> list[list[RawAction]]:
    """ZB-H1 (h = 1) and ZB-H2 (h = 2) (arXiv 2401.10241, section 2): W fills what would be waits.

    Device k is h(K-1-k) forwards ahead, then does a forward and a B in turn, and from its B number
    hk on (from 0) one W after each B; the hk that are left come last. So every device has at most
    h(K-1) + 1 micro-batches between F and W: the later ones, which have fewer between F and B, have
    more W's put off. The W's begin earlier where M is so small that the forwards end before: from
    there on there is time after every B, for the forward that is no longer.
    """
    rows = []
    for k in range(K):
        forwards: list[RawAction] = [("F", k, m) for m in range(M)]
        ahead = min(h * (K - 1 - k), M)
        put_off = min(h * k, max(M - ahead - 1, 0))
        row: list[RawAction] = []
        for step in _alternate(forwards, [("B", k, m) for m in range(M)], ahead):
            row.append(step)
            if step[0] == "B" and step[2] >= put_off:
                row.append(("W", k, step[2] - put_off))
        rows.append([*row, *[("W", k, m) for m in range(M - put_off, M)]])
    return rows


def zb_v(K: int, M: int) -> list[list[RawAction]]:
    """ZB-V (arXiv 2401.10241, section 6; arXiv 2405.15362): two stages per device, laid out as a V.

    Device k has stage k on the way down and stage 2K-1-k on the way up, so the last stage follows
    the first half on the same device and its backward can start at once. The period, once all
    devices are busy, is one micro-batch at each of a device's stages,

        F down, B down, W down, F up, B up, W up,

    in which device k is at these micro-batches in cycle 0 (and one further in each cycle):

        F down 2K-1-k   B, W down 0   F up K   B, W up K-k

    which puts 2K forwards between F and W on every device, 1F1B's memory as a stage is half of
    1F1B's. Before it, the device does what those numbers leave out: forwards down until the first
    comes up, forwards in turn until the last stage's gradient comes, then F, B, W up. After it, the
    gradients of inputs go first, as other devices wait for them, and W's fill in. The order holds
    for M >= 2K-1; for a smaller M the surplus is left out.
    """
    rows = []
    rounded = max(M, 2 * K - 1)
    for k in range(K):
        down, up = k, 2 * K - 1 - k
        row: list[RawAction] = [("F", down, m) for m in range(2 * (K - k) - 1)]
        for m in range(k):
            row += [("F", up, m), ("F", down, 2 * (K - k) - 1 + m)]
        for m in range(K - k):
            row += [("F", up, k + m), ("B", up, m), ("W", up, m)]
        for cycle in range(rounded - K):
            row += [("F", down, 2 * K - 1 - k + cycle)]
            row += [("B", down, cycle), ("W", down, cycle)]
            row += [("F", up, K + cycle), ("B", up, K - k + cycle), ("W", up, K - k + cycle)]
        first_down, first_up = rounded - K, rounded - k
        for i in range(k):
            row += [("B", down, first_down + i), ("B", up, first_up + i)]
        for i in range(K - k):
            row += [("B", down, first_down + k + i), ("W", down, first_down + i)]
        row += [("W", up, m) for m in range(first_up, rounded)]
        row += [("W", down, m) for m in range(rounded - k, rounded)]
        rows.append([step for step in row if step[2] < M])
    return rows
