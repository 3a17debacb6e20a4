"""Measures a GPU's peak memory bandwidth and matrix throughput."""

from collections.abc import Callable

import torch

from benchmarks.machine_limits import MachineLimits

_COPIED_BYTES = 2**28
_PRODUCT_SIZE = 8192
_CALLS = 8  # timed together, so that launches cost nothing


class GpuLimitMeter:
    """Measures the limits of one GPU. No GPU has run this class yet.

    Bandwidth is that of copies within its memory, bytes read plus written. The rate is that of
    torch's products of square matrices.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """``dtype`` is that of the products."""
        self._data = torch.zeros(2, _COPIED_BYTES, dtype=torch.uint8, device=device)
        self._factors = torch.randn(2, _PRODUCT_SIZE, _PRODUCT_SIZE, device=device).to(dtype)
        self._product = torch.empty_like(self._factors[0])
        self._stream = torch.cuda.current_stream(device)

    @torch.inference_mode()
    def measure(self) -> MachineLimits:
        """Time a few copies and products; takes tens of milliseconds."""
        one, other = self._data
        left, right = self._factors
        copy_s = self._seconds(lambda: one.copy_(other))
        product_s = self._seconds(lambda: torch.mm(left, right, out=self._product))
        return MachineLimits(
            gb_per_s=2 * _COPIED_BYTES / copy_s / 1e9,
            gflops=2 * _PRODUCT_SIZE**3 / product_s / 1e9,
        )

    def _seconds(self, call: Callable[[], object]) -> float:
        """Seconds of one call, after a warm-up call."""
        call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(self._stream)
        for _ in range(_CALLS):
            call()
        end.record(self._stream)
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3 / _CALLS
