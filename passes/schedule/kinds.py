"""Every schedule kind: the order in which its devices run micro-batches, and the table `KINDS`.

To add a kind, write its order function and add one row to the table. Option checks, error messages
and help texts read the table.

An order function takes K devices, M micro-batches and v stages per device, so vK stages in all. For
each device it lists what the device runs in one training step as (letters, stage, micro-batch),
where the letters are "F", "B" and "W", or "BW" for a backward that computes the gradients of inputs
and parameters together. The order does not depend on times. Every stage runs the forwards of
micro-batches 0..M-1 in that order, and so its backwards. `schedule` (in `build`) adds
rematerialization.

The bubbles in the docstrings below (idle time within the span of the longest device) hold for
equal stages and free transfers; T = F + R + B + W.

Two families are defined for some M only. For another M, their orders are generated for more
micro-batches, and the surplus is dropped. The result is still valid: micro-batches depend on one
another only through the order of a device.
"""

from __future__ import annotations

from collections.abc import Iterator

from .schedule_kind import Order, RawAction, ScheduleKind
from .v_shapes import v_half, v_min


def gpipe(K: int, M: int, v: int) -> Order:
    """Run all micro-batches forward, then all backward (arXiv 1811.06965, section 2.2).

    Bubble: (K - 1)T. With early recompute it is what remains of a makespan of
    (M + K - 1)F + M(R + B + W) + (K - 1)(B + W).

    Args:
        K, M, v: numbers of devices, micro-batches and stages per device.
    """
    return [[(letters, k, m) for letters in ("F", "BW") for m in range(M)] for k in range(K)]


def interleaved(K: int, M: int, v: int) -> Order:
    """Alternate one forward and one backward after warm-up; stage s is on device s mod K.

    With v = 1 this is PipeDream-Flush, or 1F1B (arXiv 2006.09503, section 2.2): device k runs
    K - 1 - k warm-up forwards. With v > 1 (arXiv 2104.04473, section 2.2) a device takes K
    micro-batches through one of its stages, then the same K through its next one, and runs
    2(K - 1 - k) + (v - 1)K warm-up forwards; M is rounded up to a multiple of K and the surplus is
    dropped.

    Bubble: (K - 1)T / v if v = 1 or M is a multiple of K.

    Args:
        K, M, v: numbers of devices, micro-batches and stages per device.
    """
    rounded = M if v == 1 else -(-M // K) * K
    group = M if v == 1 else K
    starts = range(0, rounded, group)
    turns = [(c, start + i) for start in starts for c in range(v) for i in range(group)]
    devices = []
    for k in range(K):
        forwards = [("F", c * K + k, m) for c, m in turns]
        backwards = [("BW", (v - 1 - c) * K + k, m) for c, m in turns]
        warm_up = K - 1 - k if v == 1 else 2 * (K - 1 - k) + (v - 1) * K
        devices.append([one for one in _alternate(forwards, backwards, warm_up) if one[2] < M])
    return devices


def zb_h1(K: int, M: int, v: int) -> Order:
    """ZB-H1 (arXiv 2401.10241, section 2): split backward, with the memory of 1F1B.

    Bubble without R: (K - 1)(F + B - W) if W <= F and M >= K. If M <= K and W <= min(F, B), it is
    what remains of a makespan of (M + K - 1)(F + B) + W (1F1B: (M + K - 1)(F + B + W)).

    Args:
        K, M, v: numbers of devices, micro-batches and stages per device.
    """
    return _zero_bubble(K, M, 1)


def zb_h2(K: int, M: int, v: int) -> Order:
    """ZB-H2 (arXiv 2401.10241, section 2): as ZB-H1, with 2K - 1 micro-batches in flight.

    Bubble without R: (K - 1)(F + B - 2W) if W <= min(F, B) and M >= 2K - 1; for M <= K as ZB-H1.

    Args:
        K, M, v: numbers of devices, micro-batches and stages per device.
    """
    return _zero_bubble(K, M, 2)


def zb_v(K: int, M: int, v: int) -> Order:
    """ZB-V (arXiv 2401.10241, section 6; arXiv 2405.15362): two stages per device, placed as a V.

    Device k has stage k on the way down and stage 2K-1-k on the way up, so the last stage follows
    the first half on the same device and its backward can start at once. In the steady state, a
    period is one micro-batch at each of a device's stages,

        F down, B down, W down, F up, B up, W up,

    and in cycle 0 device k is at these micro-batches (one further in each later cycle):

        F down 2K-1-k   B, W down 0   F up K   B, W up K-k

    That puts 2K forwards between F and W on every device: the memory of 1F1B, as a stage is half of
    1F1B's. The warm-up runs the actions before these: forwards down until the first micro-batch
    comes up, forwards in turn until the gradient of the last stage arrives, then F, B, W up. In the
    cool-down, gradients of inputs go first, because other devices wait for them, and W's fill in.
    The order holds for M >= 2K - 1; for a smaller M the surplus is dropped.

    Bubble without R: 0 if F = B = W and M >= 2K - 1. If M <= K and W <= min(F, B), it is at most
    that of ZB-H1.

    Args:
        K, M, v: numbers of devices, micro-batches and stages per device.
    """
    rounded = max(M, 2 * K - 1)
    devices = []
    for k in range(K):
        actions = _v_warm_up(K, k) + _v_steady(K, k, rounded - K) + _v_cool_down(K, k, rounded)
        devices.append([one for one in actions if one[2] < M])
    return devices


KINDS = {
    kind.name: kind
    for kind in (
        ScheduleKind(
            "gpipe",
            gpipe,
            "all micro-batches forward, then all backward (arXiv 1811.06965)",
            forwards_first=True,
        ),
        ScheduleKind(
            "1f1b",
            interleaved,
            "each backward as early as possible, PipeDream-Flush (arXiv 2006.09503)",
        ),
        ScheduleKind(
            "interleaved",
            interleaved,
            "1F1B with several stages per device (arXiv 2104.04473)",
            virtual_stages=2,
            any_virtual_stages=True,
        ),
        ScheduleKind(
            "zb-h1",
            zb_h1,
            "weight gradients fill the bubble, memory of 1F1B (arXiv 2401.10241)",
        ),
        ScheduleKind(
            "zb-h2",
            zb_h2,
            "weight gradients fill the bubble, 2K - 1 micro-batches in flight (arXiv 2401.10241)",
        ),
        ScheduleKind(
            "zb-v",
            zb_v,
            "as zb-h1 with two stages per device, placed as a V (arXiv 2405.15362)",
            virtual_stages=2,
        ),
        ScheduleKind(
            "v-half",
            v_half,
            "as zb-v, with half of its memory, and half of 1F1B's bubble (arXiv 2405.15362)",
            virtual_stages=2,
        ),
        ScheduleKind(
            "v-min",
            v_min,
            "as zb-v, with a third of its memory, for equal F, B, W (arXiv 2405.15362)",
            virtual_stages=2,
        ),
    )
}
"""Every kind by its name."""

DEFAULT_KIND = "gpipe"
"""The kind that runs if the user names none."""


def _alternate(
    forwards: list[RawAction], backwards: list[RawAction], warm_up: int
) -> Iterator[RawAction]:
    """`warm_up` forwards, then one forward and one backward in turn, then the other backwards."""
    yield from forwards[:warm_up]
    for i, backward in enumerate(backwards):
        yield from forwards[warm_up + i : warm_up + i + 1]
        yield backward


def _zero_bubble(K: int, M: int, h: int) -> Order:
    """ZB-H1 (h = 1) and ZB-H2 (h = 2): W runs where the device would wait.

    Device k runs h(K - 1 - k) warm-up forwards, then alternates F and B. From its B number hk on
    (from 0), one W follows each B; the remaining hk come last. So every device has at most
    h(K - 1) + 1 micro-batches between F and W: later devices have fewer between F and B and delay
    more W's. If M is so small that the forwards end first, the W's start earlier: from there on
    the time of the missing forward is free after every B.
    """
    devices = []
    for k in range(K):
        forwards: list[RawAction] = [("F", k, m) for m in range(M)]
        warm_up = min(h * (K - 1 - k), M)
        delayed = min(h * k, max(M - warm_up - 1, 0))
        actions: list[RawAction] = []
        for one in _alternate(forwards, [("B", k, m) for m in range(M)], warm_up):
            actions.append(one)
            if one[0] == "B" and one[2] >= delayed:
                actions.append(("W", k, one[2] - delayed))
        devices.append([*actions, *[("W", k, m) for m in range(M - delayed, M)]])
    return devices


def _v_warm_up(K: int, k: int) -> list[RawAction]:
    """What device k of ZB-V runs before the steady state."""
    down, up = k, 2 * K - 1 - k
    actions: list[RawAction] = [("F", down, m) for m in range(2 * (K - k) - 1)]
    for m in range(k):
        actions += [("F", up, m), ("F", down, 2 * (K - k) - 1 + m)]
    for m in range(K - k):
        actions += [("F", up, k + m), ("B", up, m), ("W", up, m)]
    return actions


def _v_steady(K: int, k: int, cycles: int) -> list[RawAction]:
    """The periods of device k of ZB-V."""
    down, up = k, 2 * K - 1 - k
    actions: list[RawAction] = []
    for cycle in range(cycles):
        actions += [("F", down, 2 * K - 1 - k + cycle), ("B", down, cycle), ("W", down, cycle)]
        actions += [("F", up, K + cycle), ("B", up, K - k + cycle), ("W", up, K - k + cycle)]
    return actions


def _v_cool_down(K: int, k: int, M: int) -> list[RawAction]:
    """What device k of ZB-V runs after the steady state."""
    down, up = k, 2 * K - 1 - k
    first_down, first_up = M - K, M - k
    actions: list[RawAction] = []
    for i in range(k):
        actions += [("B", down, first_down + i), ("B", up, first_up + i)]
    for i in range(K - k):
        actions += [("B", down, first_down + k + i), ("W", down, first_down + i)]
    actions += [("W", up, m) for m in range(first_up, M)]
    actions += [("W", down, m) for m in range(M - k, M)]
    return actions
