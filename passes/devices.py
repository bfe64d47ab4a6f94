"""Device models: a table of devices, and the roofline time of work on one. No torch.

    seconds = max(flops / (peak * fraction), bytes / (bandwidth * fraction)) + launch overhead

The roofline model: Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009. Peak FLOP/s,
bandwidth and memory size are the vendors' figures for dense matrices (vendors print tensor-core
figures for sparse matrices, which are twice as high), with GB and GFLOP as powers of ten. No data
sheet says which fraction of the peak is reached. `Fractions` are assumptions of this project, in
separate fields so that measurements (`autopipe.planning.profile_calls`) can replace them.

To add a device: define it below and list it in `DEVICES`. Its name is then accepted wherever a
device is named, help texts and messages list it, and a GPU whose CUDA name contains one of its
`names_in_torch` uses it.

Sources:

    h100      NVIDIA H100 Tensor Core GPU data sheet, column SXM; NVLink 900 GB/s in both directions
    h200      NVIDIA H200 Tensor Core GPU data sheet, column SXM
    a100-80gb NVIDIA A100 Tensor Core GPU data sheet, column 80GB SXM; NVLink 600 GB/s in both
    l4        NVIDIA L4 Tensor Core GPU data sheet; PCIe Gen4 x16, 64 GB/s in both
    rtx4090   NVIDIA Ada GPU Architecture white paper, appendix A, GeForce RTX 4090 (tensor cores
              with fp32 accumulation); PCIe Gen4 x16
              (compute capabilities: NVIDIA, CUDA C++ Programming Guide, table of GPUs)
    cpu-core  no data sheet: one core of an AMD EPYC (family 26), `python -m benchmarks.costs cpu`;
              its memory is one core's share of a typical server
    host_link PCI Express Base Specification: Gen5 x16 has 63 GB/s in each direction (data sheets of
              H100 and H200: 128 in both), Gen4 x16 31.5. No data sheet says what copies of pinned
              memory reach: 55 and 25 are assumptions

Link latencies and launch overheads are assumptions too (no data sheet gives them): a copy between
devices and a kernel launch from Python take a few microseconds each.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from autopipe.errors import OptionError

KINDS = ("matmul", "convolution", "attention", "memory")
"""Kinds of work: matrix products, convolutions, attention, and memory-bound work."""

PRECISIONS = ("fp32", "half")
"""Precisions of matrix products: elements of four or eight bytes, or of two (fp16, bf16)."""


ADAM_BYTES = 8
"""Optimizer state in bytes per trained parameter element: the default of every memory estimate.

Adam and AdamW store two moments of 4 bytes (fp32) each: Kingma and Ba, "Adam", ICLR 2015, algorithm
1.
"""


@dataclass(frozen=True)
class Link:
    """A connection between two devices, in one direction.

    Attributes:
        gbytes_per_second: bandwidth in 10⁹ bytes per second; infinite if nothing is copied.
        latency_seconds: time of an empty transfer.

    Raises:
        OptionError: the bandwidth is not positive, or the latency is negative.
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
        """Return the time of a transfer of `nbytes` bytes."""
        return self.latency_seconds + nbytes / (self.gbytes_per_second * 1e9)


@dataclass(frozen=True)
class Fractions:
    """The fractions (0 to 1) of a device's peak FLOP/s and bandwidth that its kernels reach.

    Attributes:
        matmul: of peak FLOP/s, by matrix products.
        convolution: likewise, by convolutions.
        attention: likewise, by attention.
        bandwidth: of the memory bandwidth, by any kernel.

    Raises:
        OptionError: a fraction is not above 0 and at most 1.
    """

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
        """Return the fraction of the peak for a kind of work.

        (It hardly matters for memory-bound work, which has few FLOPs.)
        """
        return self.matmul if kind == "memory" else float(getattr(self, kind))


@dataclass(frozen=True)
class Device:
    """The figures of one device.

    Attributes:
        name: key in `DEVICES`.
        fp32_flops: peak fp32 FLOP/s, outside tensor cores.
        tf32_flops: peak FLOP/s of fp32 products in TF32; equal to fp32 where there is no TF32.
        half_flops: peak FLOP/s of fp16 and bf16 products with fp32 accumulation.
        gbytes_per_second: memory bandwidth in 10⁹ bytes per second.
        memory_bytes: memory size.
        link: connection to another device of the same kind.
        fractions: the fractions of these peaks that are reached.
        launch_seconds: overhead of each op on the device.
        call_seconds: in which one process calls an operator (a view, too), from any thread: its
            devices share it. 0: `launch_seconds` contains it.
        tf32: whether fp32 products may use TF32 (torch's default: they may not).
        compute_capability: of a CUDA device, major and minor: plans go by the kernels that torch
            takes there (`autopipe.passes.kernels`). None: by those of the device that traces.
        names_in_torch: parts of `torch.cuda.get_device_name` by which such a GPU is recognized, in
            lower case; empty for a device that is no GPU. Whole words count: "l4" is not in "L40S".
        host_link: connection to the host's memory, pinned; None: its memory is the host's.
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
    call_seconds: float = 0.0
    tf32: bool = False
    compute_capability: tuple[int, int] | None = None
    names_in_torch: tuple[str, ...] = ()
    host_link: Link | None = None

    def peak_flops(self, precision: str) -> float:
        """Return the peak FLOP/s of products in a precision of `PRECISIONS`."""
        if precision == "half":
            return self.half_flops
        return self.tf32_flops if self.tf32 else self.fp32_flops

    def seconds(self, flops: float, nbytes: float, kind: str, precision: str) -> float:
        """Return the roofline time of one op.

        Args:
            flops: floating-point operations.
            nbytes: bytes read and written.
            kind: one of `KINDS`.
            precision: one of `PRECISIONS`.

        Returns:
            Seconds; 0 for an op that neither computes nor moves anything (a view launches no
            kernel).

        Raises:
            OptionError: unknown kind or precision.
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


CALL = 7e-6
"""140,000 operator calls a second, by 1 to 8 threads of one process (CPython 3.11)."""
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
    call_seconds=CALL,
    compute_capability=(9, 0),
    names_in_torch=("h100",),
    host_link=Link(55, 10e-6),
)
H200 = replace(
    H100,
    name="h200",
    gbytes_per_second=4800,
    memory_bytes=141 * 10**9,
    names_in_torch=("h200",),
)
A100 = replace(
    H100,
    name="a100-80gb",
    fp32_flops=19.5e12,
    tf32_flops=156e12,
    half_flops=312e12,
    gbytes_per_second=2039,
    link=Link(300, 10e-6),
    compute_capability=(8, 0),
    names_in_torch=("a100",),
    host_link=Link(25, 10e-6),
)
L4 = replace(
    A100,
    name="l4",
    fp32_flops=30.3e12,
    tf32_flops=60e12,
    half_flops=121e12,
    gbytes_per_second=300,
    memory_bytes=24 * 10**9,
    link=Link(32, 20e-6),
    compute_capability=(8, 9),
    names_in_torch=("l4",),
)
RTX4090 = replace(
    L4,
    name="rtx4090",
    fp32_flops=82.6e12,
    tf32_flops=82.6e12,
    half_flops=165.2e12,
    gbytes_per_second=1008,
    names_in_torch=("rtx 4090", "rtx4090"),
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
"""Every device model, by its name."""

DEFAULT = CPU_CORE
"""The device whose times are shown if the user names none."""

UNKNOWN_GPU = H100
"""The device model of a GPU that no entry of the table matches."""


def device_of(name: str) -> Device:
    """Look up a device model by its name in `DEVICES`.

    Raises:
        OptionError: no device has that name.
    """
    if name not in DEVICES:
        raise OptionError("no such device", expected=f"one of {', '.join(DEVICES)}", found=name)
    return DEVICES[name]


def device_named_in_torch(torch_name: str) -> Device:
    """Find the device model of a GPU.

    Args:
        torch_name: what `torch.cuda.get_device_name` returns, such as "NVIDIA A100-SXM4-80GB".

    Returns:
        The first device in `DEVICES` one of whose `names_in_torch` occurs in it as whole words;
        `UNKNOWN_GPU` if there is none.
    """
    words = f" {' '.join(re.split(r'[^a-z0-9]+', torch_name.lower()))} "
    known = (d for d in DEVICES.values() if any(f" {n} " in words for n in d.names_in_torch))
    return next(known, UNKNOWN_GPU)
