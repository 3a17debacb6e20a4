"""Smallest and largest useful row cache of all value tables in host memory."""

from collections.abc import Collection
from typing import NamedTuple

from engine.model.config import MemoryConfig
from memory_ops.tables.host_cache_size import host_cache_bytes
from weights.checkpoints.table_files import RowLayout


class HostCacheLimits(NamedTuple):
    """Sizes in bytes of the row cache that the tables share.

    Attributes:
        smallest: the least with which the host tier works.
        largest: a larger cache is not used, because this one caches every row.
    """

    smallest: int
    largest: int


def host_cache_limits(layouts: Collection[RowLayout], memory: MemoryConfig) -> HostCacheLimits:
    """The limits for tables in these layouts.

    Each table has to cache the rows that one token reads. The tables share the cache evenly, so
    each share is that of the table with the widest rows.
    """
    row_bytes = max(layout.num_bytes // layout.shape[0] for layout in layouts)
    rows_per_token = min(memory.num_heads * memory.top_k, memory.num_rows)
    smallest, largest = (
        len(layouts) * host_cache_bytes(num_rows, row_bytes)
        for num_rows in (rows_per_token, memory.num_rows)
    )
    return HostCacheLimits(smallest, largest)
