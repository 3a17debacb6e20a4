"""Measures a card's peak rates: copies in its memory, copies from the host, and products."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.figures import Figure
from benchmarks.gpu.graph_timing import replayed_us
from engine.model.machine_limits import MachineLimits

_COPIED_BYTES = 2**28
_PRODUCT_SIZE = 8192
_ROUNDS = 11
COPY, PRODUCT, BUS = "copy in device memory", "bf16 product 8192", "copy from pinned host memory"
LIMIT_NAMES = (COPY, PRODUCT, BUS)


@dataclass(frozen=True)
class CardLimits:
    """Peak rates of a card.

    Attributes:
        device: GB/s of a copy within device memory, bytes read plus written.
        tflops: of a bf16 product of square matrices.
        bus: GB/s of a copy from pinned host memory.
    """

    device: float
    tflops: float
    bus: float

    @classmethod
    def of(cls, value: Callable[[str], float | None]) -> "CardLimits":
        """The limits with measured values; RuntimeError if one is missing."""
        device, tflops, bus = (value(name) for name in LIMIT_NAMES)
        if device is None or tflops is None or bus is None:
            raise RuntimeError("the limits of the card were not measured")
        return cls(device, tflops, bus)

    @property
    def machine(self) -> MachineLimits:
        """The device's own limits, for rooflines."""
        return MachineLimits(gb_per_s=self.device, gflops=self.tflops * 1e3)


def measured_limits(names: Sequence[str]) -> Iterator[Figure]:
    """Measure the limits of these names."""
    measures = {
        COPY: (_copied_gb_per_s, "GB/s"),
        PRODUCT: (lambda: _product_tflops(torch.bfloat16), "TFLOP/s"),
        BUS: (_bus_gb_per_s, "GB/s"),
    }
    for name in names:
        measure, unit = measures[name]
        yield Figure(name, measure(), unit)


@torch.inference_mode()
def gpu_limits(dtype: torch.dtype, device: torch.device) -> MachineLimits:
    """Measure a GPU's limits for rooflines, with products in ``dtype``; takes a tenth of a second
    or so, and about 1 GiB of its memory."""
    with torch.cuda.device(device):
        return MachineLimits(gb_per_s=_copied_gb_per_s(), gflops=_product_tflops(dtype) * 1e3)


def _copied_gb_per_s() -> float:
    data = torch.empty(2, _COPIED_BYTES, dtype=torch.uint8, device="cuda")
    us = replayed_us([lambda: data[0].copy_(data[1])] * 8, _ROUNDS)
    return 2 * _COPIED_BYTES / us / 1e3


def _product_tflops(dtype: torch.dtype) -> float:
    factors = torch.randn(2, _PRODUCT_SIZE, _PRODUCT_SIZE, device="cuda").to(dtype)
    out = torch.empty_like(factors[0])
    us = replayed_us([lambda: torch.mm(factors[0], factors[1], out=out)] * 4, _ROUNDS)
    return 2 * _PRODUCT_SIZE**3 / us / 1e6


def _bus_gb_per_s() -> float:
    data = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    pinned = torch.empty_like(data, device="cpu").pin_memory()
    us = replayed_us([lambda: data.copy_(pinned, non_blocking=True)] * 2, _ROUNDS)
    return _COPIED_BYTES / us / 1e3
