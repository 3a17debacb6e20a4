"""Memory sizing on a GPU: the tier of the value tables, and errors about lack of memory."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

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
        request: the user's settings.
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
        """Divide the memory of GPU and host among the tables' tier.

        ``auto`` loads the tables into the GPU's memory if they fit together with the weights, a
        reserve of ``request.kv_bytes`` for the KV pool, 1 GiB for a step and the memory of row
        patches, or if they fit in the row cache that they would get. Otherwise it loads them into
        host memory, if they leave 2 GiB of it. Otherwise they stay on disk, behind a row cache in
        host memory and one of the default size in the GPU's. A log line explains the decision.
        Unless the user requested a KV pool, its size is left to the executor, which measures the
        memory that is left.

        Args:
            table_bytes: all tables in their served layout; 0 if there are none.
            weight_bytes: all other tensors in the served dtype.

        Raises:
            ConfigError: the weights or a request exceed the GPU's memory; the tables, or the row
                cache of tables on disk, exceed the host's; the requested row cache is too small; a
                row cache or a slower tier is requested for a model without tables; or the host's
                available memory cannot be read, but decides.
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
        cache, host_cache = None, None
        if table_bytes:
            cache, host_cache = self._cache_bytes(table_bytes, weight_bytes, gpu)
        if not self.request.is_kv_requested:
            return MemoryShares(cache, None, host_cache)
        self.request.check_kv(gpu, weight_bytes, table_bytes if cache is None else cache)
        return MemoryShares(cache, self.request.kv_bytes, host_cache)

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

    def _cache_bytes(
        self, table_bytes: int, weight_bytes: int, gpu: AvailableMemory
    ) -> tuple[int | None, int | None]:
        """The row cache of the GPU, or None for the device tier, and of the host in the disk
        tier."""
        request, sizes = self.request, (table_bytes, weight_bytes, gpu)
        beyond_weights = gpu.num_bytes - weight_bytes
        left = beyond_weights - request.kv_bytes - self._step_bytes
        if request.tier == "device":
            request.check_fits("table_tier: device needs", table_bytes, beyond_weights, gpu)
            return None, None
        smallest, largest = self.cache_limits
        if request.tier == "auto" and request.takes_all_rows(table_bytes, left, smallest):
            request.check_fits("table_tier: tables need", table_bytes, beyond_weights, gpu)
            is_unused = request.requested_cache is not None
            decision = "are loaded into the GPU's memory (device tier)"
            if is_unused:
                decision += "; --table-cache is unused"
            self._log(is_unused, decision, *sizes)
            return None, None
        host = self._host_memory()
        if request.tier == "disk" or not self._fits_host(table_bytes, host):
            return self._disk_caches(host, *sizes)
        cache = min(request.fitting_cache(left, smallest), largest)
        if cache < smallest:
            raise ConfigError(
                f"table_cache: {size_text(cache)} is too small for these tables in host memory;"
                f" --table-cache must be at least {-(-smallest // 2**20)}MiB"
            )
        request.log_excess_cache(largest)
        least = "the smallest takes" if cache == smallest else "takes"
        request.check_fits(f"table_cache: {least}", cache, beyond_weights, gpu)
        if request.tier == "auto":
            decision = f"stay in host memory (host tier) with a row cache of {size_text(cache)}"
            self._log(True, decision, *sizes)
        return cache, None

    def _disk_caches(
        self,
        host: AvailableMemory | None,
        table_bytes: int,
        weight_bytes: int,
        gpu: AvailableMemory,
    ) -> tuple[int, int]:
        """The row caches of the GPU and of the host for tables on disk."""
        beyond_weights = gpu.num_bytes - weight_bytes
        left = beyond_weights - self.request.kv_bytes - self._step_bytes
        # --table-cache is the host's
        on_gpu, (smallest, largest) = replace(self.request, requested_cache=None), self.cache_limits
        cache = min(on_gpu.fitting_cache(left, smallest), largest)
        on_gpu.check_fits("table_tier: disk needs a row cache of", cache, beyond_weights, gpu)
        self.request.log_excess_cache(table_bytes)
        host_cache = self.request.full_cache
        if host is not None:
            beyond_reserve = max(0, host.num_bytes - _HOST_RESERVE_BYTES)
            host_cache = self.request.fitting_cache(beyond_reserve)
            # nothing else of the host's memory depends on the tables
            request = replace(self.request, patch_bytes=0)
            taken = min(host_cache, table_bytes)
            request.check_fits("table_cache: takes", taken, beyond_reserve, host, "other uses")
        if self.request.tier == "auto":
            on_host = size_text(min(host_cache, table_bytes))
            decision = (
                "fit neither in the GPU's memory nor in host memory; they stay on disk (disk tier)"
                f" with row caches of {on_host} in host memory (--table-cache) and"
                f" {size_text(cache)} in the GPU's"
            )
            self._log(True, decision, table_bytes, weight_bytes, gpu)
        return cache, host_cache

    def _host_memory(self) -> AvailableMemory | None:
        """The host's available memory; None, with a warning, if it cannot be read.

        Raises:
            ConfigError: it cannot be read, but ``auto`` depends on it.
        """
        try:
            return self.read_host()
        except (OSError, ValueError) as error:
            if self.request.tier == "auto":
                why = f"cannot read the available host memory ({error}); set another tier"
                raise ConfigError(f"table_tier: auto {why}") from None
            logger.warning("host memory is not checked: cannot read available memory: %s", error)
            return None

    def _fits_host(self, table_bytes: int, host: AvailableMemory | None) -> bool:
        """Whether the tables fit in host memory, which they do not leave.

        Raises:
            ConfigError: they do not, but the user requested the host tier.
        """
        if host is None:
            return True
        left = max(0, host.num_bytes - _HOST_RESERVE_BYTES)
        if table_bytes <= left:
            return True
        if self.request.tier == "auto":
            return False
        raise ConfigError(
            f"table_tier: tables of {size_text(table_bytes)} do not fit in host memory"
            f" ({size_text(left)} of {size_text(host.num_bytes)} is left: {host.bound}); use a"
            " smaller --table-dtype, --table-tier disk, or --table-tier device"
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
    *,
    is_on_disk: bool = False,
) -> Iterator[None]:
    """Turn torch's error about too little GPU memory into one that says what to change.

    Args:
        device: the device to load to; nothing happens unless it is a GPU.
        weight_bytes: what the weights need.
        row_bytes: what tables or row caches need on the device.
        is_cached: these are row caches.
        is_on_disk: the tables are on disk, so --table-cache is no memory of the device.
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
        remedy = "" if is_on_disk else remedy
        raise ConfigError(
            f"device: {device} is out of memory: weights take {size_text(weight_bytes)} and table"
            f" rows {size_text(row_bytes)}, but {size_text(free)} of {size_text(total)} was free;"
            f" use {remedy}another GPU"
        ) from None
