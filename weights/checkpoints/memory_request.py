"""Memory that a user requests for an engine, the shares it gets, and texts of their sizes."""

import logging
from dataclasses import dataclass

from engine.errors import ConfigError
from weights.available_memory import AvailableMemory

# available memory is an estimate, so these sizes are always tried
MIN_CACHE_BYTES = 256 * 2**20
_MIN_KV_BYTES = 64 * 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryShares:
    """Memory of an engine in addition to the weights.

    Attributes:
        cache_bytes: the device's row cache of a slower tier, or None for the device tier.
        kv_bytes: KV pool; None on a GPU leaves its size to the executor.
        host_cache_bytes: the host's row cache of tables on disk behind a GPU; None otherwise.
    """

    cache_bytes: int | None
    kv_bytes: int | None
    host_cache_bytes: int | None = None


@dataclass(frozen=True)
class MemoryRequest:
    """User settings of tables and KV pool.

    Attributes:
        kv_bytes: largest size of the KV pool; 0 if there is none.
        requested_cache: row cache bytes that the user requested, or None.
        default_cache: row cache in bytes if the user requested none and memory is no limit. For
            tables on disk behind a GPU, the request is the host's cache, and this is the GPU's.
        tier: auto, device, host or disk, as the user requested.
        is_kv_requested: the user requested ``kv_bytes``, so they are not reduced.
        grammar_bytes: host memory that compiled grammars may take.
        patch_bytes: memory of the device that row patches may take.
    """

    kv_bytes: int
    requested_cache: int | None
    default_cache: int
    tier: str = "auto"
    is_kv_requested: bool = False
    grammar_bytes: int = 0
    patch_bytes: int = 0

    @property
    def full_cache(self) -> int:
        """The row cache if memory is no limit."""
        return self.default_cache if self.requested_cache is None else self.requested_cache

    def fitting_cache(self, left: int, smallest: int = 0) -> int:
        """The requested row cache, or the largest that fits in ``left`` bytes, at least 256 MiB
        and ``smallest``."""
        if self.requested_cache is not None:
            return self.requested_cache
        return max(smallest, min(self.default_cache, max(left, MIN_CACHE_BYTES)))

    def log_excess_cache(self, largest: int) -> None:
        """Log that the requested row cache is larger than ``largest``, which holds every row."""
        if self.requested_cache is not None and self.requested_cache > largest:
            # a warning, so that it is logged at every level
            logger.warning(
                "--table-cache %s is more than the tables need: the row cache holds all rows in %s",
                size_text(self.requested_cache),
                size_text(largest),
            )

    def fitting_kv(self, left: int) -> int:
        """The largest KV pool that fits in ``left`` bytes, at least 64 MiB."""
        return min(self.kv_bytes, max(left, _MIN_KV_BYTES))

    def takes_all_rows(self, table_bytes: int, left: int, smallest_cache: int = 0) -> bool:
        """Whether ``auto`` loads all rows: they fit in ``left`` bytes, or no cache is requested and
        they fit in ``fitting_cache``."""
        if table_bytes <= left:
            return True
        cache = self.fitting_cache(left, smallest_cache)
        return self.requested_cache is None and table_bytes <= cache

    def check_without_tables(self) -> None:
        """Raise ConfigError if a setting needs value tables, which the model does not have."""
        problem = "value tables, but this model has none"
        if self.tier in ("disk", "host"):
            raise ConfigError(f"table_tier: {self.tier} requires {problem}")
        if self.requested_cache is not None:
            raise ConfigError(f"table_cache: requires {problem}")

    def check_patches(self, memory: AvailableMemory, weight_bytes: int) -> None:
        """Raise ConfigError if row patches get more memory than the weights leave."""
        left = max(memory.num_bytes - weight_bytes, 0)
        if self.patch_bytes > max(left, MIN_CACHE_BYTES):
            raise ConfigError(
                f"patch_memory_gib: {size_text(self.patch_bytes)} does not fit: the weights leave"
                f" {size_text(left)} ({size_text(memory.num_bytes)} is available: {memory.bound});"
                " reduce it"
            )

    def check_kv(self, memory: AvailableMemory, weight_bytes: int, row_bytes: int) -> None:
        """Raise ConfigError if the requested KV pool does not fit beside weights, table rows and
        row patches."""
        left = memory.num_bytes - weight_bytes - row_bytes - self.patch_bytes
        if self.kv_bytes > max(left, _MIN_KV_BYTES):
            patches = f" and {size_text(self.patch_bytes)} for row patches"
            raise ConfigError(
                f"kv_cache_gib: {size_text(self.kv_bytes)} does not fit:"
                f" {size_text(memory.num_bytes)} is available ({memory.bound}), less"
                f" {size_text(weight_bytes)} for weights and {size_text(row_bytes)} for table rows"
                f"{patches if self.patch_bytes else ''}"
                f" leaves {size_text(max(left, 0))}; reduce it"
            )

    def check_fits(
        self,
        needs: str,
        num_bytes: int,
        beyond_weights: int,
        memory: AvailableMemory,
        users: str = "the weights",
    ) -> None:
        """Raise ConfigError for sizes that exceed what weights, or other ``users``, and row patches
        leave; the KV pool and steps may use less."""
        left = beyond_weights - self.patch_bytes
        if num_bytes > max(left, MIN_CACHE_BYTES):
            users += " and row patches" if self.patch_bytes else ""
            raise ConfigError(
                f"{needs} {size_text(num_bytes)}, but {users} leave {size_text(max(left, 0))}"
                f" ({size_text(memory.num_bytes)} is available: {memory.bound})"
            )


def size_text(num_bytes: int) -> str:
    """Bytes as KiB, MiB, GiB or TiB."""
    for name, unit in (("TiB", 2**40), ("GiB", 2**30)):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    if 0 < num_bytes < 2**20:
        return f"{num_bytes / 2**10:.1f} KiB"
    return f"{num_bytes / 2**20:.1f} MiB"
