"""Which tier ``auto`` picks for value tables: memory where they fit, else the disk."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import ConfigError
from weights.available_memory import AvailableMemory, available_memory

# activations, buffers and what the process itself is
_STEP_BYTES = 512 * 2**20
_LEAST_CACHE_BYTES = 256 * 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TierChoice:
    """What decides, the sizes of the model apart.

    Attributes:
        kv_bytes: memory that KV blocks may come to take.
        asked_cache: memory for rows on disk that the user asked for.
        default_cache: as much as that at most, where nothing was asked for.
        tier: auto, device or disk: what the user asked for.
        available: what tells how much memory there is.
    """

    kv_bytes: int
    asked_cache: int | None
    default_cache: int
    tier: str = "auto"
    available: Callable[[], AvailableMemory] = available_memory

    def cache_bytes(self, table_bytes: int, weight_bytes: int) -> int | None:
        """Memory for rows of tables on disk, or None: the tables are held in memory.

        ``auto`` holds them where they fit beside the weights, the KV blocks and 512 MiB, and where
        the disk tier would have as much memory for rows without being asked. One line of the log
        says which and why.

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
            return None
        cache = self.default_cache if self.asked_cache is None else self.asked_cache
        try:
            memory = self.available()
        except (OSError, ValueError) as error:
            if self.tier != "auto":
                return None if self.tier == "device" else cache
            message = f"table_tier: auto cannot tell what memory there is ({error}); choose another"
            raise ConfigError(message) from None
        beside = memory.num_bytes - weight_bytes
        if self.tier == "device":
            _check_fits("table_tier: device needs", table_bytes, beside, memory)
            return None
        if self.tier == "auto":
            return self._chosen(table_bytes, weight_bytes, memory)
        _check_fits("table_cache: takes", min(cache, table_bytes), beside, memory)
        return cache

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
