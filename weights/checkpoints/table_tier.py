"""Memory sizing: chooses the tier of the value tables and the bytes of the KV pool."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import ConfigError
from weights.available_memory import AvailableMemory, available_memory

# activations, buffers, and the process itself
_STEP_BYTES = 512 * 2**20
_MIN_CACHE_BYTES = 256 * 2**20
_MIN_KV_BYTES = 64 * 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryShares:
    """Memory of an engine in addition to the weights.

    Attributes:
        cache_bytes: row cache of the disk tier, or None for the device tier.
        kv_bytes: KV pool.
    """

    cache_bytes: int | None
    kv_bytes: int


@dataclass(frozen=True)
class TierChoice:
    """User settings and limits that decide the tier and the sizes.

    Attributes:
        kv_bytes: largest size of the KV pool; 0 if there is none.
        requested_cache: row cache bytes that the user requested, or None.
        default_cache: largest row cache in bytes if the user requested none.
        tier: auto, device or disk, as the user requested.
        available: reads the available memory.
        is_kv_requested: the user requested ``kv_bytes``, so they are not reduced.
    """

    kv_bytes: int
    requested_cache: int | None
    default_cache: int
    tier: str = "auto"
    available: Callable[[], AvailableMemory] = available_memory
    is_kv_requested: bool = False

    def shares(self, table_bytes: int, weight_bytes: int) -> MemoryShares:
        """Divide the available memory, which is read once.

        ``auto`` loads the tables into memory if they fit together with the weights, the KV pool and
        512 MiB, or if they fit in the default row cache. If the user did not request a KV pool, it
        gets the rest: at most ``kv_bytes``, at least 64 MiB. A log line explains each decision.

        Args:
            table_bytes: all tables in their served layout; 0 if there are none.
            weight_bytes: all other tensors in the served dtype.

        Raises:
            ConfigError: a row cache or the disk tier is requested for a model without tables; a
                request exceeds the memory left by the weights; or ``auto`` cannot read the
                available memory.
        """
        if not table_bytes:
            self._check_no_table_options()
        try:
            memory = self.available()
        except (OSError, ValueError) as error:
            return self._unchecked(table_bytes, error)
        cache = self._cache_bytes(table_bytes, weight_bytes, memory) if table_bytes else None
        row_bytes = table_bytes if cache is None else min(cache, table_bytes)
        return MemoryShares(cache, self._kv_bytes(weight_bytes, row_bytes, memory))

    def _unchecked(self, table_bytes: int, error: Exception) -> MemoryShares:
        """The shares if the available memory cannot be read."""
        if table_bytes and self.tier == "auto":
            message = (
                f"table_tier: auto cannot read the available memory ({error}); set another tier"
            )
            raise ConfigError(message) from None
        logger.warning("memory limits are not checked: cannot read available memory: %s", error)
        cache = self.default_cache if self.requested_cache is None else self.requested_cache
        return MemoryShares(cache if table_bytes and self.tier == "disk" else None, self.kv_bytes)

    def _cache_bytes(
        self, table_bytes: int, weight_bytes: int, memory: AvailableMemory
    ) -> int | None:
        cache = self.default_cache if self.requested_cache is None else self.requested_cache
        left = memory.num_bytes - weight_bytes
        if self.tier == "device":
            _check_fits("table_tier: device needs", table_bytes, left, memory)
            return None
        if self.tier == "auto":
            return self._auto_cache_bytes(table_bytes, weight_bytes, memory)
        _check_fits("table_cache: takes", min(cache, table_bytes), left, memory)
        return cache

    def _kv_bytes(self, weight_bytes: int, row_bytes: int, memory: AvailableMemory) -> int:
        """Bytes of the KV pool, after the weights and the rows in memory."""
        if not self.kv_bytes:
            return 0
        left = memory.num_bytes - weight_bytes - row_bytes
        if not self.is_kv_requested:
            kv_bytes = min(self.kv_bytes, max(left - _STEP_BYTES, _MIN_KV_BYTES))
        elif self.kv_bytes <= max(left, _MIN_KV_BYTES):
            kv_bytes = self.kv_bytes
        else:
            raise ConfigError(
                f"kv_cache_gib: {_size(self.kv_bytes)} does not fit: {_size(memory.num_bytes)} is"
                f" available ({memory.bound}), less {_size(weight_bytes)} for weights and"
                f" {_size(row_bytes)} for table rows leaves {_size(max(left, 0))}; reduce it"
            )
        for_steps = "" if self.is_kv_requested else f" and {_size(_STEP_BYTES)} for a step"
        logger.log(
            logging.INFO if kv_bytes == self.kv_bytes else logging.WARNING,
            "KV pool takes %s: %s is available (%s), less %s for weights, %s for table rows%s",
            *(_size(kv_bytes), _size(memory.num_bytes), memory.bound),
            *(_size(weight_bytes), _size(row_bytes), for_steps),
        )
        return kv_bytes

    def _check_no_table_options(self) -> None:
        problem = "value tables, but this model has none"
        if self.tier == "disk":
            raise ConfigError(f"table_tier: disk requires {problem}")
        if self.requested_cache is not None:
            raise ConfigError(f"table_cache: requires {problem}")

    def _auto_cache_bytes(
        self, table_bytes: int, weight_bytes: int, memory: AvailableMemory
    ) -> int | None:
        left = memory.num_bytes - weight_bytes - self.kv_bytes - _STEP_BYTES
        cache = self.requested_cache
        if cache is None:
            cache = min(self.default_cache, max(left, _MIN_CACHE_BYTES))
        else:
            beyond_weights = memory.num_bytes - weight_bytes
            _check_fits("table_cache: takes", min(cache, table_bytes), beyond_weights, memory)
        is_loaded = table_bytes <= left or (self.requested_cache is None and table_bytes <= cache)
        if table_bytes <= left:
            decision = "are loaded into memory (device tier)"
        elif is_loaded:
            decision = (
                f"are loaded into memory (device tier): they fit in a cache of {_size(cache)}"
            )
        else:
            decision = f"stay on disk with a row cache of {_size(cache)}"
        is_unused = is_loaded and self.requested_cache is not None
        # a slower tier or an unused option is a warning, so that it is logged at every level
        logger.log(
            logging.INFO if is_loaded and not is_unused else logging.WARNING,
            "tables of %s %s%s: %s is available (%s), less %s for weights, %s for the KV pool and"
            " %s for a step",
            *(_size(table_bytes), decision),
            "; --table-cache is unused" if is_unused else "",
            *(_size(memory.num_bytes), memory.bound),
            *(_size(weight_bytes), _size(self.kv_bytes), _size(_STEP_BYTES)),
        )
        return None if is_loaded else cache


def _check_fits(needs: str, num_bytes: int, left: int, memory: AvailableMemory) -> None:
    """Reject sizes that cannot fit; the KV pool and steps may use less than their limits."""
    # the smallest cache of ``auto`` is always accepted, because available memory is an estimate
    if num_bytes > max(left, _MIN_CACHE_BYTES):
        raise ConfigError(
            f"{needs} {_size(num_bytes)}, but the weights leave {_size(max(left, 0))}"
            f" ({_size(memory.num_bytes)} is available: {memory.bound})"
        )


def _size(num_bytes: int) -> str:
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.2f} GiB"
