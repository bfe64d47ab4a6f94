"""What a device can do, as figures: a table of devices, and the time of some work on one.

    seconds = max(flops / (peak · fraction), bytes / (bandwidth · fraction)) + launch   (roofline)

after Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009. Peaks, bandwidths and memory
are the vendors' figures, dense (vendors print the tensor cores' figures for sparse matrices, which
are twice those here), GB and GFLOP in powers of ten. What of the peak is reached is nobody's data
sheet: `Fractions` are this project's assumptions, fields of their own so that a measurement
(`autopipe.planning.profile_calls`) can replace them. No torch.

Sources:

    h100      NVIDIA H100 Tensor Core GPU data sheet, column SXM; NVLink 900 GB/s in both directions
    h200      NVIDIA H200 Tensor Core GPU data sheet, column SXM
    a100-80gb NVIDIA A100 Tensor Core GPU data sheet, column 80GB SXM; NVLink 600 GB/s in both
    l4        NVIDIA L4 Tensor Core GPU data sheet; PCIe Gen4 x16, 64 GB/s in both
    rtx4090   NVIDIA Ada GPU Architecture white paper, appendix A, GeForce RTX 4090 (tensor cores
              with fp32 accumulation); PCIe Gen4 x16
    cpu-core  no data sheet: one core of an AMD EPYC (family 26), `python -m benchmarks.costs cpu`;
              memory is what a core's share of a server may be

Latencies and launch overheads stand in no data sheet either: a copy between devices and a kernel's
launch take a few microseconds from Python; they too are assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from autopipe.errors import OptionError

KINDS = ("matmul", "convolution", "attention", "memory")
"""Kinds of work: products of matrices, convolutions, attention, and all that is bound by memory."""

PRECISIONS = ("fp32", "half")
"""What products are computed in: elements of four (or eight) bytes, or of two (fp16, bf16)."""


ADAM_BYTES = 8
"""Bytes of optimizer state per element of a parameter: Adam's two moments in fp32."""


@dataclass(frozen=True)
class Link:
    """A connection between two devices, one direction.

    Attributes:
        gbytes_per_second: bandwidth in 10⁹ bytes a second; infinite where nothing is copied.
        latency_seconds: of a transfer of nothing.

    Raises:
        OptionError: a bandwidth that is not above 0, a latency below it.
    """

    gbytes_per_second: float
    latency_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.gbytes_per_second > 0 or not self.latency_seconds >= 0:
            raise OptionError(
                "no such link",
                expected="gbytes_per_second > 0 and latency_seconds >= 0",
                found=f"{self.gbytes_per_second} and {self.latency_seconds}",
            )

    def seconds(self, nbytes: float) -> float:
        """Time of a transfer of `nbytes` bytes."""
        return self.latency_seconds + nbytes / (self.gbytes_per_second * 1e9)


@dataclass(frozen=True)
class Fractions:
    """What is reached of a device's peak by kind of work, and of its memory bandwidth: 0 to 1."""

    matmul: float
    convolution: float
    attention: float
    bandwidth: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value <= 1:
                raise OptionError(
                    f"fraction `{name}`", expected="above 0, at most 1", found=str(value)
                )

    def of(self, kind: str) -> float:
        """Fraction of the peak for a kind of work (what is bound by memory has few FLOPs)."""
        return self.matmul if kind == "memory" else float(getattr(self, kind))


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: key in `DEVICES`.
        fp32_flops: peak of fp32 in FLOP/s, outside tensor cores.
        tf32_flops: peak of fp32 products in TF32 in FLOP/s; that of fp32 where there is none.
        half_flops: peak of fp16 and bf16 products with fp32 accumulation in FLOP/s.
        gbytes_per_second: memory bandwidth in 10⁹ bytes a second.
        memory_bytes: size of its memory.
        link: to another device of its kind.
        fractions: what is reached of these.
        launch_seconds: overhead of a call, whatever it does.
        tf32: whether fp32 products may use TF32 (torch's default: they may not).
    """

    name: str
    fp32_flops: float
    tf32_flops: float
    half_flops: float
    gbytes_per_second: float
    memory_bytes: int
    link: Link
    fractions: Fractions
    launch_seconds: float
    tf32: bool = False

    def peak_flops(self, precision: str) -> float:
        """Peak in FLOP/s of products in a precision of `PRECISIONS`."""
        if precision == "half":
            return self.half_flops
        return self.tf32_flops if self.tf32 else self.fp32_flops

    def seconds(self, flops: float, nbytes: float, kind: str, precision: str) -> float:
        """Time of one call.

        Args:
            flops: floating-point operations.
            nbytes: bytes read and written.
            kind: of `KINDS`.
            precision: of `PRECISIONS`.

        Returns:
            Seconds; 0 for what neither computes nor moves anything (a view is no launch).

        Raises:
            OptionError: another kind or precision.
        """
        if kind not in KINDS or precision not in PRECISIONS:
            raise OptionError(
                "unknown work",
                expected=f"one of {', '.join(KINDS)} in one of {', '.join(PRECISIONS)}",
                found=f"{kind} in {precision}",
            )
        if not flops and not nbytes:
            return 0.0
        computing = flops / (self.peak_flops(precision) * self.fractions.of(kind))
        moving = nbytes / (self.gbytes_per_second * 1e9 * self.fractions.bandwidth)
        return max(computing, moving) + self.launch_seconds


_GPU = Fractions(matmul=0.7, convolution=0.5, attention=0.5, bandwidth=0.8)

H100 = Device(
    name="h100",
    fp32_flops=67e12,
    tf32_flops=494.5e12,
    half_flops=989.5e12,
    gbytes_per_second=3350,
    memory_bytes=80 * 10**9,
    link=Link(450, 10e-6),
    fractions=_GPU,
    launch_seconds=5e-6,
)
H200 = replace(H100, name="h200", gbytes_per_second=4800, memory_bytes=141 * 10**9)
A100 = Device(
    name="a100-80gb",
    fp32_flops=19.5e12,
    tf32_flops=156e12,
    half_flops=312e12,
    gbytes_per_second=2039,
    memory_bytes=80 * 10**9,
    link=Link(300, 10e-6),
    fractions=_GPU,
    launch_seconds=5e-6,
)
L4 = Device(
    name="l4",
    fp32_flops=30.3e12,
    tf32_flops=60e12,
    half_flops=121e12,
    gbytes_per_second=300,
    memory_bytes=24 * 10**9,
    link=Link(32, 20e-6),
    fractions=_GPU,
    launch_seconds=5e-6,
)
RTX4090 = Device(
    name="rtx4090",
    fp32_flops=82.6e12,
    tf32_flops=82.6e12,
    half_flops=165.2e12,
    gbytes_per_second=1008,
    memory_bytes=24 * 10**9,
    link=Link(32, 20e-6),
    fractions=_GPU,
    launch_seconds=5e-6,
)
CPU_CORE = Device(
    name="cpu-core",
    fp32_flops=100e9,
    tf32_flops=100e9,
    half_flops=100e9,
    gbytes_per_second=40,
    memory_bytes=8 * 10**9,
    link=Link(math.inf),
    fractions=Fractions(matmul=0.9, convolution=0.5, attention=0.4, bandwidth=0.5),
    launch_seconds=2e-6,
)

DEVICES = {d.name: d for d in (H100, H200, A100, L4, RTX4090, CPU_CORE)}

DEFAULT = CPU_CORE
"""Whose times are told where no device is named."""


def device_of(name: str) -> Device:
    """A device of the table.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in DEVICES:
        raise OptionError("no such device", expected=f"one of {', '.join(DEVICES)}", found=name)
    return DEVICES[name]
