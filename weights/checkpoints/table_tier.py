"""Memory sizing on a CPU: the tier of the value tables (memory or disk) and the KV pool."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from weights.available_memory import AvailableMemory, available_memory, memory_if_known
from weights.checkpoints.memory_request import (
    MIN_CACHE_BYTES,
    MemoryRequest,
    MemoryShares,
    size_text,
)

# activations, buffers, and the process itself
_STEP_BYTES = 512 * 2**20

logger = logging.getLogger(__name__)


def check_rows_fit(
    folder: Path, row_bytes: int, available: Callable[[], AvailableMemory] = available_memory
) -> None:
    """Raise ConfigError if all table rows of a folder exceed the memory available on this machine.

    Memory that cannot be read is not checked, and 256 MiB are always tried.
    """
    memory = memory_if_known(available)
    if memory is not None and row_bytes > max(memory.num_bytes, MIN_CACHE_BYTES):
        raise ConfigError(
            f"{folder}: the table rows take {size_text(row_bytes)} of memory, but"
            f" {size_text(memory.num_bytes)} is available ({memory.bound}); give the tables a"
            " smaller dtype with `memplus quantize`, or free memory"
        )


@dataclass(frozen=True)
class CpuTierChoice:
    """Decides the tier and the sizes for a model on the CPU.

    Attributes:
        request: the user's settings; the tier is auto, device or disk.
        available: reads the available memory.
        largest_cache: bytes of a row cache that holds all rows; None if it is not known.
    """

    request: MemoryRequest
    available: Callable[[], AvailableMemory] = available_memory
    largest_cache: int | None = None

    @property
    def _step_bytes(self) -> int:
        return _STEP_BYTES + self.request.grammar_bytes + self.request.patch_bytes

    @property
    def _for_steps(self) -> str:
        users = "step, grammars and patches" if self.request.patch_bytes else "step and grammars"
        return f"{size_text(self._step_bytes)} for a {users}"

    def shares(self, table_bytes: int, weight_bytes: int) -> MemoryShares:
        """Divide the available memory, which is read once.

        ``auto`` loads the tables into memory if they fit together with the weights, the KV pool,
        512 MiB for a step, its grammars and row patches, or if they fit in the default row cache.
        If the user did not request a KV pool, it gets the rest: at most ``kv_bytes``, at least
        64 MiB. A log line explains each decision.

        Args:
            table_bytes: all tables in their served layout; 0 if there are none.
            weight_bytes: all other tensors in the served dtype.

        Raises:
            ConfigError: a row cache or the disk tier is requested for a model without tables; a
                request exceeds the memory left by the weights; or ``auto`` cannot read the
                available memory.
        """
        if not table_bytes:
            self.request.check_without_tables()
        try:
            memory = self.available()
        except (OSError, ValueError) as error:
            return self._unchecked(table_bytes, error)
        self.request.check_patches(memory, weight_bytes)
        cache = self._cache_bytes(table_bytes, weight_bytes, memory) if table_bytes else None
        if cache is not None and self.largest_cache is not None:
            self.request.log_excess_cache(self.largest_cache)
        row_bytes = table_bytes if cache is None else min(cache, table_bytes)
        return MemoryShares(cache, self._kv_bytes(weight_bytes, row_bytes, memory))

    def _unchecked(self, table_bytes: int, error: Exception) -> MemoryShares:
        """The shares if the available memory cannot be read."""
        if table_bytes and self.request.tier == "auto":
            message = (
                f"table_tier: auto cannot read the available memory ({error}); set another tier"
            )
            raise ConfigError(message) from None
        logger.warning("memory limits are not checked: cannot read available memory: %s", error)
        is_on_disk = table_bytes and self.request.tier == "disk"
        return MemoryShares(self.request.full_cache if is_on_disk else None, self.request.kv_bytes)

    def _cache_bytes(
        self, table_bytes: int, weight_bytes: int, memory: AvailableMemory
    ) -> int | None:
        left = memory.num_bytes - weight_bytes
        if self.request.tier == "device":
            self.request.check_fits("table_tier: device needs", table_bytes, left, memory)
            return None
        if self.request.tier == "auto":
            return self._auto_cache_bytes(table_bytes, weight_bytes, memory)
        cache = self.request.full_cache
        self.request.check_fits("table_cache: takes", min(cache, table_bytes), left, memory)
        return cache

    def _kv_bytes(self, weight_bytes: int, row_bytes: int, memory: AvailableMemory) -> int:
        """Bytes of the KV pool, after the weights and the rows in memory."""
        wanted = self.request.kv_bytes
        if not wanted:
            return 0
        kv_bytes, for_steps = wanted, ""
        if self.request.is_kv_requested:
            self.request.check_kv(memory, weight_bytes, row_bytes)
        else:
            left = memory.num_bytes - weight_bytes - row_bytes - self._step_bytes
            kv_bytes = self.request.fitting_kv(left)
            for_steps = f" and {self._for_steps}"
        logger.log(
            logging.INFO if kv_bytes == wanted else logging.WARNING,
            "KV pool takes %s: %s is available (%s), less %s for weights, %s for table rows%s",
            *(size_text(kv_bytes), size_text(memory.num_bytes), memory.bound),
            *(size_text(weight_bytes), size_text(row_bytes), for_steps),
        )
        return kv_bytes

    def _auto_cache_bytes(
        self, table_bytes: int, weight_bytes: int, memory: AvailableMemory
    ) -> int | None:
        request = self.request
        beyond_weights = memory.num_bytes - weight_bytes
        left = beyond_weights - request.kv_bytes - self._step_bytes
        cache = request.fitting_cache(left)
        if request.requested_cache is not None:
            self.request.check_fits(
                "table_cache: takes", min(cache, table_bytes), beyond_weights, memory
            )
        is_loaded = request.takes_all_rows(table_bytes, left)
        if table_bytes <= left:
            decision = "are loaded into memory (device tier)"
        elif is_loaded:
            decision = (
                f"are loaded into memory (device tier): they fit in a cache of {size_text(cache)}"
            )
        else:
            decision = f"stay on disk with a row cache of {size_text(cache)}"
        is_unused = is_loaded and request.requested_cache is not None
        # a slower tier or an unused option is a warning, so that it is logged at every level
        logger.log(
            logging.INFO if is_loaded and not is_unused else logging.WARNING,
            "tables of %s %s%s: %s is available (%s), less %s for weights, %s for the KV pool and"
            " %s",
            *(size_text(table_bytes), decision),
            "; --table-cache is unused" if is_unused else "",
            *(size_text(memory.num_bytes), memory.bound),
            *(size_text(weight_bytes), size_text(request.kv_bytes), self._for_steps),
        )
        return None if is_loaded else cache
