"""Points of ``memplus bench memory``: every combination of its options for a model."""

from collections.abc import Iterator
from itertools import product

from benchmarks.memory.load import MemoryLoad, Point
from benchmarks.memory.swept_model import SweptModel
from engine.errors import ConfigError
from engine.model.config import ModelConfig
from memory_ops.tables.disk import row_cache_bytes
from weights.checkpoints.table_files import row_layout

# tokens of the prompts before decode rounds
INPUT_LEN = 16
# tokens that a sequence may generate before the timed ones, at most
UNTIMED_LEN = 16
_PAGE_CACHE = {"device": "unused", "disk": "excluded", "mmap": "dropped"}


def points(model: SweptModel, load: MemoryLoad) -> dict[Point, float | None]:
    """The points of a settled load, each once, and the disk tier's share of cached rows.

    Raises:
        ConfigError: a sequence would be longer than the model allows, or a row cache cannot hold
            the rows of one token.
    """
    _check_lengths(model.config, load)
    workloads = [*((batch, 0) for batch in load.batches), *((1, n) for n in load.prompt_lens)]
    found: dict[Point, float | None] = {}
    for dtype, rows, (tier, share) in product(load.row_dtypes, load.rows, _places(load)):
        cache = 0 if share is None else _cache_bytes(model, dtype, rows, share)
        is_disk = tier == "disk"
        for (batch, prompt_len), skew in product(workloads, load.skews):
            lookahead = load.lookahead if is_disk and not prompt_len else 0
            recall, candidates = load.prediction if lookahead else (None, None)
            point = Point(
                rows=rows,
                tier=tier,
                dtype=dtype,
                batch=batch,
                skew=skew,
                cache_bytes=cache,
                page_cache=_PAGE_CACHE[tier],
                is_cold=tier == "mmap" or (is_disk and load.cold),
                lookahead=lookahead,
                candidates=candidates,
                recall=recall,
                prompt_len=prompt_len,
                is_own=model.is_own(rows),
            )
            found.setdefault(point, share)
    return found


def _places(load: MemoryLoad) -> Iterator[tuple[str, float | None]]:
    for tier in load.tiers:
        if tier == "disk":
            yield from ((tier, share) for share in load.cache_shares)
        else:
            yield tier, None


def _cache_bytes(model: SweptModel, dtype: str, rows: int, share: float) -> int:
    """Bytes of the row caches of all tables."""
    cached, memory = round(rows * share), model.memory
    least = min(memory.num_heads * memory.top_k, rows)
    if cached < least:
        raise ConfigError(
            f"cache_shares: {share:g} of {rows} rows are {cached}, but one token reads up to"
            f" {least}"
        )
    row_size = row_layout(dtype, rows, memory.value_dim).num_bytes // rows
    return len(model.config.table_names) * row_cache_bytes(cached, row_size, rows)


def _check_lengths(model: ModelConfig, load: MemoryLoad) -> None:
    most = model.max_positions
    if max(load.prompt_lens, default=0) >= most:
        raise ConfigError(f"prompt_lens: {max(load.prompt_lens)} must be below {most}")
    if load.output_len > most - INPUT_LEN - UNTIMED_LEN:
        before = INPUT_LEN + UNTIMED_LEN
        raise ConfigError(
            f"output_len: {load.output_len} is too long: up to {before} tokens precede the timed"
            f" ones, and the model has {most} positions"
        )
