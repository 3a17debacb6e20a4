"""The machine of a plan: its memories, their bandwidths, and its products a second."""

from dataclasses import dataclass

from engine.model.machine_limits import MachineLimits


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: memory in bytes, and GB and TFLOP a second.

    ``gb_per_s`` is that of reading its memory, ``bus_gb_per_s`` that of reading pinned host memory,
    ``tflops`` that of dense bf16 products.
    """

    memory: int
    gb_per_s: float
    tflops: float
    bus_gb_per_s: float


_GIB = 2**30
# The H100 as memplus measured it (docs/gpu.md); the others as their makers publish them.
GPUS = {
    "h100": Gpu(80 * _GIB, 3000, 770, 54.5),
    "h200": Gpu(141 * _GIB, 4800, 770, 54.5),
    "a100": Gpu(80 * _GIB, 2039, 312, 25),
    "l40s": Gpu(48 * _GIB, 864, 362, 25),
    "l4": Gpu(24 * _GIB, 300, 121, 25),
    "rtx4090": Gpu(24 * _GIB, 1008, 165, 25),
}


@dataclass(frozen=True)
class DiskLimits:
    """Random reads of one row.

    Attributes:
        reads_per_s: reads per second, if many are in flight.
        latency_s: seconds of one read alone.
        origin: ``given``, ``measured``, ``assumed``, or a part of each.
    """

    reads_per_s: float
    latency_s: float
    origin: str = "given"


@dataclass(frozen=True)
class Machine:
    """One machine.

    Attributes:
        name: what the plan calls it.
        host_memory: bytes that the server may use.
        limits: bandwidth and products of the device that computes: the sum of all GPUs, or the CPU.
        disk: random reads of one table row.
        device_memory: bytes of all GPUs together; None if the CPU computes.
        bus_gb_per_s: bandwidth of all GPUs together to pinned host memory.
        threads: threads of the CPU that computes; 0 with a GPU.
    """

    name: str
    host_memory: int
    limits: MachineLimits
    disk: DiskLimits
    device_memory: int | None = None
    bus_gb_per_s: float = 0.0
    threads: int = 0


def gpu_machine(name: str, gpu: Gpu, count: int, host_memory: int, disk: DiskLimits) -> Machine:
    """A machine with ``count`` GPUs of one kind."""
    limits = MachineLimits(count * gpu.gb_per_s, count * gpu.tflops * 1e3)
    return Machine(
        f"{count} x {name}",
        host_memory,
        limits,
        disk,
        count * gpu.memory,
        count * gpu.bus_gb_per_s,
    )
