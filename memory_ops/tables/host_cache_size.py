"""Device memory that the row cache of a host table needs; works without Triton."""

NUM_WAYS = 16
# overflow rows for one part of a lookup: 128 tokens of 128 rows
NUM_OVERFLOW = 2**14
# bookkeeping of a cached row
STATE_BYTES = 16


def host_cache_bytes(
    num_rows: int,
    row_bytes: int,
    *,
    num_ways: int = NUM_WAYS,
    num_overflow: int = NUM_OVERFLOW,
) -> int:
    """Bytes of a cache whose sets hold ``num_rows`` rows, with its overflow rows.

    A cache has whole sets, at least one.

    Args:
        num_rows: rows to cache.
        row_bytes: bytes of a row.
        num_ways: rows of a set.
        num_overflow: rows for lookups whose rows find no place in their sets.
    """
    num_sets = max(1, -(-num_rows // num_ways))
    return num_overflow * row_bytes + num_sets * num_ways * (row_bytes + STATE_BYTES)
