"""The machine of a plan: its memories, their bandwidths, and its products a second."""

from dataclasses import dataclass
from typing import NamedTuple

from engine.model.machine_limits import MachineLimits


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: memory in bytes, and GB and TFLOP a second.

    ``gb_per_s`` is that of reading its memory, ``bus_gb_per_s`` that of reading pinned host memory,
    ``link_gb_per_s`` that of sending to other GPUs of the machine, ``tflops`` that of dense bf16
    products.
    """

    memory: int
    gb_per_s: float
    tflops: float
    bus_gb_per_s: float
    link_gb_per_s: float


_GIB = 2**30
# The H100 as memplus measured it (docs/gpu.md); the others, and all links, as their makers publish
# them: NVLink, or the bus where there is none.
GPUS = {
    "h100": Gpu(80 * _GIB, 3000, 770, 54.5, 450),
    "h200": Gpu(141 * _GIB, 4800, 770, 54.5, 450),
    "a100": Gpu(80 * _GIB, 2039, 312, 25, 300),
    "l40s": Gpu(48 * _GIB, 864, 362, 25, 25),
    "l4": Gpu(24 * _GIB, 300, 121, 25, 25),
    "rtx4090": Gpu(24 * _GIB, 1008, 165, 25, 25),
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


class Link(NamedTuple):
    """The connection of a tensor-parallel rank to the other ranks of its machine.

    Attributes:
        gb_per_s: bandwidth in each direction.
        latency_s: seconds of one collective, in addition to its bytes.
        origin: ``given``, ``assumed``, or a part of each.
    """

    gb_per_s: float
    latency_s: float
    origin: str = "given"


@dataclass(frozen=True)
class Machine:
    """One machine, whose ``ranks`` share a model.

    Attributes:
        name: what the plan calls it.
        host_memory: bytes that the server may use; 0 if no tier needs them.
        limits: bandwidth and products of one GPU, or of the CPU.
        disk: random reads of one table row.
        ranks: processes that share the model. Each has a GPU, or its part of the CPU.
        link: the connection of the ranks; None if there is one.
        device_memory: bytes of one GPU; None if the CPU computes.
        bus_gb_per_s: bandwidth of one GPU to pinned host memory.
        threads: threads of the CPU that computes; 0 with a GPU.
    """

    name: str
    host_memory: int
    limits: MachineLimits
    disk: DiskLimits
    ranks: int = 1
    link: Link | None = None
    device_memory: int | None = None
    bus_gb_per_s: float = 0.0
    threads: int = 0

    @property
    def is_on_gpu(self) -> bool:
        """Whether GPUs compute."""
        return self.device_memory is not None

    @property
    def rank_limits(self) -> MachineLimits:
        """Bandwidth and products of one rank, if all ranks use them at the same time."""
        one, parts = self.limits, 1 if self.is_on_gpu else self.ranks
        return MachineLimits(one.gb_per_s / parts, one.gflops / parts, one.integer_gops / parts)

    @property
    def rank_threads(self) -> int:
        """Threads of one rank; 0 with a GPU."""
        return max(1, self.threads // self.ranks) if self.threads else 0


def gpu_machine(
    name: str, gpu: Gpu, count: int, host_memory: int, disk: DiskLimits, link: Link | None = None
) -> Machine:
    """A machine with ``count`` GPUs of one kind, one for each rank."""
    return Machine(
        f"{count} x {name}",
        host_memory,
        MachineLimits(gpu.gb_per_s, gpu.tflops * 1e3),
        disk,
        count,
        link,
        gpu.memory,
        gpu.bus_gb_per_s,
    )
