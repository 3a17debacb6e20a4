"""Memory sizing: value tables in memory or on disk, and the bytes of the KV pool."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import ConfigError
from weights.available_memory import AvailableMemory, available_memory

# activations, buffers and what the process itself is
_STEP_BYTES = 512 * 2**20
_LEAST_CACHE_BYTES = 256 * 2**20
_LEAST_KV_BYTES = 64 * 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryShares:
    """Memory of an engine, beside the weights.

    Attributes:
        cache_bytes: for rows of tables on disk, or None: the tables are held in memory.
        kv_bytes: for KV blocks.
    """

    cache_bytes: int | None
    kv_bytes: int


@dataclass(frozen=True)
class TierChoice:
    """What decides, the sizes of the model apart.

    Attributes:
        kv_bytes: memory that KV blocks may come to take; 0 if there are none.
        asked_cache: memory for rows on disk that the user asked for.
        default_cache: as much as that at most, where nothing was asked for.
        tier: auto, device or disk: what the user asked for.
        available: what tells how much memory there is.
        is_kv_asked: whether the user asked for ``kv_bytes``, which are then not reduced.
    """

    kv_bytes: int
    asked_cache: int | None
    default_cache: int
    tier: str = "auto"
    available: Callable[[], AvailableMemory] = available_memory
    is_kv_asked: bool = False

    def shares(self, table_bytes: int, weight_bytes: int) -> MemoryShares:
        """Divide the available memory, which is read once.

        ``auto`` holds them where they fit beside the weights, the KV blocks and 512 MiB, and where
        the disk tier would have as much memory for rows without being asked. KV blocks that nobody
        asked for get what is left then, at most ``kv_bytes`` and at least 64 MiB. One line of the
        log for each says what was decided and why.

        Args:
            table_bytes: of all tables as they are to be; 0 where there are none.
            weight_bytes: of all else, in the dtype that is served.

        Raises:
            ConfigError: a cache or the disk was asked for, and there are no tables; what was asked
                for takes more memory than there is beside the weights; or ``auto`` is not told how
                much memory there is.
        """
        if not table_bytes:
            self._check_nothing_asked()
        try:
            memory = self.available()
        except (OSError, ValueError) as error:
            return self._unchecked(table_bytes, error)
        cache = self._cache_bytes(table_bytes, weight_bytes, memory) if table_bytes else None
        held_bytes = table_bytes if cache is None else min(cache, table_bytes)
        return MemoryShares(cache, self._kv_bytes(weight_bytes, held_bytes, memory))

    def _unchecked(self, table_bytes: int, error: Exception) -> MemoryShares:
        """The shares on a system that does not say how much memory is available."""
        if table_bytes and self.tier == "auto":
            message = f"table_tier: auto cannot tell what memory there is ({error}); choose another"
            raise ConfigError(message) from None
        logger.warning("memory is not checked, because the system does not tell it: %s", error)
        cache = self.default_cache if self.asked_cache is None else self.asked_cache
        return MemoryShares(cache if table_bytes and self.tier == "disk" else None, self.kv_bytes)

    def _cache_bytes(
        self, table_bytes: int, weight_bytes: int, memory: AvailableMemory
    ) -> int | None:
        cache = self.default_cache if self.asked_cache is None else self.asked_cache
        beside = memory.num_bytes - weight_bytes
        if self.tier == "device":
            _check_fits("table_tier: device needs", table_bytes, beside, memory)
            return None
        if self.tier == "auto":
            return self._chosen(table_bytes, weight_bytes, memory)
        _check_fits("table_cache: takes", min(cache, table_bytes), beside, memory)
        return cache

    def _kv_bytes(self, weight_bytes: int, held_bytes: int, memory: AvailableMemory) -> int:
        """The KV pool's share, beside weights and the rows held in memory."""
        if not self.kv_bytes:
            return 0
        left = memory.num_bytes - weight_bytes - held_bytes
        if not self.is_kv_asked:
            kv_bytes = min(self.kv_bytes, max(left - _STEP_BYTES, _LEAST_KV_BYTES))
        elif self.kv_bytes <= max(left, _LEAST_KV_BYTES):
            kv_bytes = self.kv_bytes
        else:
            raise ConfigError(
                f"kv_cache_gib: {_size(self.kv_bytes)} do not fit: {_size(memory.num_bytes)} is"
                f" available ({memory.bound}), and {_size(max(left, 0))} of it is left beside"
                f" {_size(weight_bytes)} of weights and {_size(held_bytes)} of table rows"
            )
        logger.log(
            logging.INFO if kv_bytes == self.kv_bytes else logging.WARNING,
            "KV blocks get %s: %s is available (%s), less %s for weights, %s for table rows and"
            " %s for a step",
            *(_size(kv_bytes), _size(memory.num_bytes), memory.bound),
            *(_size(weight_bytes), _size(held_bytes), _size(_STEP_BYTES)),
        )
        return kv_bytes

    def _check_nothing_asked(self) -> None:
        none = "value tables, and this model has none"
        if self.tier == "disk":
            raise ConfigError(f"table_tier: disk is for {none}")
        if self.asked_cache is not None:
            raise ConfigError(f"table_cache: is for {none}")

    def _chosen(self, table_bytes: int, weight_bytes: int, memory: AvailableMemory) -> int | None:
        left = memory.num_bytes - weight_bytes - self.kv_bytes - _STEP_BYTES
        cache = self.asked_cache
        if cache is None:
            cache = min(self.default_cache, max(left, _LEAST_CACHE_BYTES))
        else:
            beside = memory.num_bytes - weight_bytes
            _check_fits("table_cache: takes", min(cache, table_bytes), beside, memory)
        is_held = table_bytes <= left or (self.asked_cache is None and table_bytes <= cache)
        if table_bytes <= left:
            decision = "are held in memory (device)"
        elif is_held:
            decision = f"are held in memory (device), as the disk tier may take {_size(cache)}"
        else:
            decision = f"stay on disk, {_size(cache)} of memory are for their rows"
        is_unused = is_held and self.asked_cache is not None
        # what is slower, or is not what was asked for, is told wherever nothing else is logged, too
        logger.log(
            logging.INFO if is_held and not is_unused else logging.WARNING,
            "tables of %s %s%s: %s is available (%s), less %s for weights, %s for KV blocks and"
            " %s for a step",
            *(_size(table_bytes), decision),
            "; --table-cache is not used" if is_unused else "",
            *(_size(memory.num_bytes), memory.bound),
            *(_size(weight_bytes), _size(self.kv_bytes), _size(_STEP_BYTES)),
        )
        return None if is_held else cache


def _check_fits(what: str, needed: int, beside: int, memory: AvailableMemory) -> None:
    """Refuse what must end in want of memory; KV blocks and steps may take less than they may."""
    # as little as ``auto`` takes anyhow is never refused: what is available is an estimate
    if needed > max(beside, _LEAST_CACHE_BYTES):
        raise ConfigError(
            f"{what} {_size(needed)}, and {_size(max(beside, 0))} is left beside the weights"
            f" ({_size(memory.num_bytes)} is available: {memory.bound})"
        )


def _size(num_bytes: int) -> str:
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.2f} GiB"
