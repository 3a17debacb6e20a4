"""Memory sizing on a GPU: the tier of the value tables (device or host), and lack of memory."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from engine.errors import ConfigError
from weights.available_memory import AvailableMemory, available_memory
from weights.checkpoints.host_cache_limits import HostCacheLimits
from weights.checkpoints.memory_request import MemoryRequest, MemoryShares, size_text

# activations, graphs, workspaces: an estimate that no GPU has confirmed
_STEP_BYTES = 2**30
# page-locked memory cannot be reclaimed, so some host memory is left to everything else, of which
# compiled grammars may take a quarter
_HOST_RESERVE_BYTES = 2 * 2**30

# (free bytes, all bytes) of a GPU
ReadGpu = Callable[[torch.device], tuple[int, int]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuTierChoice:
    """Decides the tier and the sizes for a model on a GPU.

    Attributes:
        request: the user's settings; the tier is auto, device or host.
        device: the GPU.
        utilization: fraction of the GPU's memory that the engine may use.
        cache_limits: sizes of the row cache that the tables can use; unused without tables.
        read_gpu: reads the free memory and all memory of the GPU.
        read_host: reads the available host memory.
    """

    request: MemoryRequest
    device: torch.device
    utilization: float
    cache_limits: HostCacheLimits
    read_gpu: ReadGpu = torch.cuda.mem_get_info
    read_host: Callable[[], AvailableMemory] = available_memory

    def shares(self, table_bytes: int, weight_bytes: int) -> MemoryShares:
        """Divide the GPU's memory, which is read once, and size the host tier.

        ``auto`` loads the tables into the GPU's memory if they fit together with the weights, a
        reserve of ``request.kv_bytes`` for the KV pool, 1 GiB for a step and the memory of row
        patches, or if they fit in the row cache that they would get. Otherwise it loads them into
        host memory, if they leave 2 GiB of it. A log line explains the decision. Unless the user
        requested a KV pool, its size is left to the executor, which measures the memory that is
        left.

        Args:
            table_bytes: all tables in their served layout; 0 if there are none.
            weight_bytes: all other tensors in the served dtype.

        Raises:
            ConfigError: the weights or a request exceed the GPU's memory; the tables fit in neither
                memory; the requested row cache is too small; a row cache or the host tier is
                requested for a model without tables; or the host's available memory cannot be read,
                but decides.
        """
        if not table_bytes:
            self.request.check_without_tables()
        gpu = self._gpu_memory()
        if weight_bytes > gpu.num_bytes:
            raise ConfigError(
                f"device: the weights take {size_text(weight_bytes)}, but"
                f" {size_text(gpu.num_bytes)} is available ({gpu.bound}); use another GPU"
            )
        self.request.check_patches(gpu, weight_bytes)
        cache = self._cache_bytes(table_bytes, weight_bytes, gpu) if table_bytes else None
        if not self.request.is_kv_requested:
            return MemoryShares(cache, None)
        self.request.check_kv(gpu, weight_bytes, table_bytes if cache is None else cache)
        return MemoryShares(cache, self.request.kv_bytes)

    @property
    def _step_bytes(self) -> int:
        return _STEP_BYTES + self.request.patch_bytes

    def _gpu_memory(self) -> AvailableMemory:
        free, total = self.read_gpu(self.device)
        in_use = total - free
        bound = f"{self.utilization:g} of {self.device}, --gpu-memory-utilization"
        if in_use:
            bound += f", less {size_text(in_use)} in use"
        return AvailableMemory(max(0, int(total * self.utilization) - in_use), bound)

    def _cache_bytes(self, table_bytes: int, weight_bytes: int, gpu: AvailableMemory) -> int | None:
        beyond_weights = gpu.num_bytes - weight_bytes
        left = beyond_weights - self.request.kv_bytes - self._step_bytes
        if self.request.tier == "device":
            self.request.check_fits("table_tier: device needs", table_bytes, beyond_weights, gpu)
            return None
        smallest, largest = self.cache_limits
        if self.request.tier == "auto" and self.request.takes_all_rows(table_bytes, left, smallest):
            self.request.check_fits("table_tier: tables need", table_bytes, beyond_weights, gpu)
            is_unused = self.request.requested_cache is not None
            decision = "are loaded into the GPU's memory (device tier)"
            if is_unused:
                decision += "; --table-cache is unused"
            self._log(is_unused, decision, table_bytes, weight_bytes, gpu)
            return None
        cache = min(self.request.fitting_cache(left, smallest), largest)
        if cache < smallest:
            raise ConfigError(
                f"table_cache: {size_text(cache)} is too small for these tables in host memory;"
                f" --table-cache must be at least {-(-smallest // 2**20)}MiB"
            )
        self.request.log_excess_cache(largest)
        self._check_host(table_bytes, beyond_weights, gpu)
        least = "the smallest takes" if cache == smallest else "takes"
        self.request.check_fits(f"table_cache: {least}", cache, beyond_weights, gpu)
        if self.request.tier == "auto":
            decision = f"stay in host memory (host tier) with a row cache of {size_text(cache)}"
            self._log(True, decision, table_bytes, weight_bytes, gpu)
        return cache

    def _check_host(self, table_bytes: int, beyond_weights: int, gpu: AvailableMemory) -> None:
        """Raise ConfigError if the tables do not fit in host memory, which they do not leave."""
        try:
            host = self.read_host()
        except (OSError, ValueError) as error:
            if self.request.tier == "auto":
                why = f"cannot read the available host memory ({error}); set another tier"
                raise ConfigError(f"table_tier: auto {why}") from None
            logger.warning("host memory is not checked: cannot read available memory: %s", error)
            return
        left = max(0, host.num_bytes - _HOST_RESERVE_BYTES)
        if table_bytes <= left:
            return
        lack = (
            f"host memory ({size_text(left)} of {size_text(host.num_bytes)} is left: {host.bound})"
        )
        if self.request.tier == "host":
            raise ConfigError(
                f"table_tier: tables of {size_text(table_bytes)} do not fit in {lack}; use a"
                " smaller --table-dtype, or --table-tier device"
            )
        raise ConfigError(
            f"table_tier: tables of {size_text(table_bytes)} fit neither in the memory of"
            f" {self.device} ({size_text(beyond_weights)} after the weights, {gpu.bound}) nor in"
            f" {lack}; a table larger than GPU and host memory is not supported on a GPU yet;"
            " use --device cpu"
        )

    def _log(
        self,
        is_warning: bool,
        decision: str,
        table_bytes: int,
        weight_bytes: int,
        gpu: AvailableMemory,
    ) -> None:
        # a slower tier or an unused option is a warning, so that it is logged at every level
        logger.log(
            logging.WARNING if is_warning else logging.INFO,
            "tables of %s %s: %s is available (%s), less %s for weights, %s for the KV pool and %s"
            " for a step%s",
            *(size_text(table_bytes), decision, size_text(gpu.num_bytes), gpu.bound),
            *(
                size_text(weight_bytes),
                size_text(self.request.kv_bytes),
                size_text(self._step_bytes),
            ),
            " and row patches" if self.request.patch_bytes else "",
        )


@contextlib.contextmanager
def naming_lack_of_memory(
    device: torch.device,
    weight_bytes: int,
    row_bytes: int,
    is_cached: bool,
    read_gpu: ReadGpu = torch.cuda.mem_get_info,
) -> Iterator[None]:
    """Turn torch's error about too little GPU memory into one that says what to change.

    Args:
        device: the device to load to; nothing happens unless it is a GPU.
        weight_bytes: what the weights need.
        row_bytes: what tables or row caches need on the device.
        is_cached: these are row caches.
        read_gpu: reads the free memory and all memory of the GPU, before it is used.

    Raises:
        ConfigError: the GPU has too little memory.
    """
    if device.type != "cuda":
        yield
        return
    free, total = read_gpu(device)
    try:
        yield
    except torch.OutOfMemoryError:
        others = "--table-tier host, --table-dtype int8 or "
        remedy = "a smaller --table-cache or " if is_cached else others if row_bytes else ""
        raise ConfigError(
            f"device: {device} is out of memory: weights take {size_text(weight_bytes)} and table"
            f" rows {size_text(row_bytes)}, but {size_text(free)} of {size_text(total)} was free;"
            f" use {remedy}another GPU"
        ) from None
