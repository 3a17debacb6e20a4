"""Measures this machine's peak memory bandwidth and matrix throughput."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.read_limits import read_library, sequential_limit, sequential_reader
from engine.model.machine_limits import MachineLimits

# rows, and inputs and outputs of the weight: large enough for the cores to be busy multiplying
PRODUCT = (512, 2048, 8192)
_TRIES = 3


class LimitMeter:
    """Measures the limits, which move with the machine's other work: in turn with what is compared.

    Bandwidth is that of reading from first to last, of memory larger than the caches; the rate is
    that of torch's products, of a weight as it is or packed by oneDNN, whichever is faster.
    """

    def __init__(self, dtype: torch.dtype, *, with_integers: bool = False) -> None:
        """``dtype`` is that of the products; products of 8-bit integers are measured on request.

        Raises:
            ConfigError: memplus was installed without its native library.
        """
        self._read = sequential_reader(read_library()).call
        self._products = list(_products(dtype))
        self._integers = _integer_product() if with_integers else None

    @torch.inference_mode()
    def measure(self) -> MachineLimits:
        """The best of a few tries, which take a tenth of a second or so."""
        rows, inputs, outputs = PRODUCT
        fastest = min(map(_fastest, self._products))
        return MachineLimits(
            gb_per_s=sequential_limit(_fastest(self._read)),
            gflops=2 * rows * inputs * outputs / fastest / 1e9,
            integer_gops=0.0
            if self._integers is None
            else 2 * rows * inputs * outputs / _fastest(self._integers) / 1e9,
        )


@torch.inference_mode()
def _products(dtype: torch.dtype) -> Iterator[Callable[[], Tensor]]:
    rows, inputs, outputs = PRODUCT
    x_TI = torch.randn(rows, inputs).to(dtype)
    weight_OI = torch.randn(outputs, inputs).to(dtype)
    yield lambda: functional.linear(x_TI, weight_OI)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        # as torch's compiler does it; private to torch, so it may go
        pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
        multiply = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if pack is not None and multiply is not None:
            packed = pack(weight_OI, rows)
            yield lambda: multiply(x_TI, packed, None, "none", [], "")


def _integer_product() -> Callable[[], Tensor]:
    rows, inputs, outputs = PRODUCT
    x_TI = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8)
    weight_OI = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    # oneDNN's product of int8, with sums in int32
    return lambda: torch._int_mm(x_TI, weight_OI.T)


def _fastest(call: Callable[..., object]) -> float:
    seconds = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
