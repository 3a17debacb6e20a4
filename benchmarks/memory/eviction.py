"""``memplus bench eviction``: simulates eviction policies on a recorded access trace."""

import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.memory.eviction_policies import POLICIES, Cache
from benchmarks.row_trace import AccessTrace
from engine.errors import ConfigError


@dataclass(frozen=True)
class Outcome:
    """Hits and misses of a policy in the second half of a trace.

    Attributes:
        policy: name of the policy or bound.
        cache_share: rows in the cache, as a fraction of the table.
        sequences: sequences that decode together.
        hit_rate: fraction of the unique rows of lookups that were in the cache.
        misses_per_token: rows per token that were not.
    """

    policy: str
    cache_share: float
    sequences: int
    hit_rate: float
    misses_per_token: float


@dataclass(frozen=True)
class Reads:
    """Row reads in the order of lookups; each lookup reads a row at most once.

    Attributes:
        rows: int64 row ids.
        first: index of the first read of the second half.
        tokens: tokens of the second half.
        num_rows: rows of the table.
    """

    rows: NDArray[np.int64]
    first: int
    tokens: int
    num_rows: int


def policy_hits(reads: Reads, cache: Cache) -> int:
    """Hits in the second half; the first half warms the cache."""
    rows = reads.rows.tolist()
    for row in rows[: reads.first]:
        cache.use(row)
    return sum(cache.use(row) for row in rows[reads.first :])


def optimal_hits(reads: Reads, num_slots: int) -> int:
    """The maximum of hits in the second half, over all policies (Belady's algorithm).

    The cache starts with the rows of the first half that are read next, and evicts the row whose
    next read is farthest away.
    """
    count, first = len(reads.rows), reads.first
    order = np.argsort(reads.rows, kind="stable")
    is_again = reads.rows[order[1:]] == reads.rows[order[:-1]]
    # per read, the index of the next read of its row; indices past the end mean never
    next_read = np.arange(count, 2 * count)
    next_read[order[:-1][is_again]] = order[1:][is_again]
    next_reads = next_read[:first]
    held = set(np.sort(next_reads[next_reads >= first])[:num_slots].tolist())
    heap = [-index for index in held]
    heapq.heapify(heap)
    hits = 0
    for index, following in enumerate(next_read[first:].tolist(), first):
        if index in held:
            held.remove(index)
            hits += 1
        elif len(held) == num_slots:
            # heap entries of past reads sort after all held ones
            held.remove(-heapq.heappop(heap))
        held.add(following)
        heapq.heappush(heap, -following)
    return hits


def static_hits(reads: Reads, num_slots: int) -> int:
    """The maximum of second-half hits for a fixed set of rows that the first half reads."""
    seen = np.bincount(reads.rows[: reads.first], minlength=reads.num_rows) > 0
    counts = np.bincount(reads.rows[reads.first :], minlength=reads.num_rows)[seen]
    return int(np.sort(counts)[::-1][:num_slots].sum())


BOUNDS: Mapping[str, Callable[[Reads, int], int]] = {
    "optimum (Belady)": optimal_hits,
    "best static": static_hits,
}


def interleaved(trace: AccessTrace, sequences: int) -> Reads:
    """Split a trace into equal sequences that decode together: one lookup per step and layer.

    Raises:
        ConfigError: a sequence would have fewer than 2 tokens.
    """
    steps = len(trace.rows_TMHK) // sequences if sequences > 0 else 0
    if steps < 2:
        tokens = len(trace.rows_TMHK)
        raise ConfigError(f"sequences: {sequences} have fewer than 2 tokens each, of {tokens}")
    parts = trace.rows_TMHK[: steps * sequences]
    rows_PSML = parts.reshape(sequences, steps, trace.rows_TMHK.shape[1], -1)
    lookups: list[NDArray[np.int64]] = []
    first = 0
    for step in range(steps):
        if step == steps // 2:
            first = sum(len(rows) for rows in lookups)
        for layer in range(rows_PSML.shape[2]):
            rows = rows_PSML[:, step, layer].reshape(-1)
            lookups.append(rows[np.sort(np.unique(rows, return_index=True)[1])])
    tokens = (steps - steps // 2) * sequences
    return Reads(np.concatenate(lookups), first, tokens, trace.counts_MR.shape[1])


def compare(trace: AccessTrace, cache_shares: Sequence[float], sequences: int) -> list[Outcome]:
    """Simulate every policy and bound with caches of these fractions of the table.

    Raises:
        ConfigError: a share is not in (0, 1] or holds no row; or as ``interleaved``.
    """
    reads, found = interleaved(trace, sequences), []
    sizes = {share: round(share * reads.num_rows) for share in cache_shares}
    for share, num_slots in sizes.items():
        if not 0 < num_slots <= reads.num_rows:
            most = reads.num_rows
            raise ConfigError(f"cache_shares: {share} is {num_slots} rows; must be 1 to {most}")
    counted = len(reads.rows) - reads.first
    with tqdm(total=len(sizes) * len([*POLICIES, *BOUNDS]), unit="cache", disable=None) as bar:
        for share, num_slots in sizes.items():
            hits = {}
            for name, make in POLICIES.items():
                hits[name] = policy_hits(reads, make(num_slots, reads.num_rows))
                bar.update()
            for name, bound in BOUNDS.items():
                hits[name] = bound(reads, num_slots)
                bar.update()
            for name, number in hits.items():
                rate, misses = number / counted, (counted - number) / reads.tokens
                found.append(Outcome(name, share, sequences, rate, misses))
    return found


def measure(
    trace_file: Path, cache_shares: Sequence[float], sequences: int, json_file: Path | None
) -> list[Outcome]:
    """Compare the policies; print a line per cache size and policy, and write them as JSON.

    Raises:
        ConfigError: as ``compare``.
        DataError: the trace cannot be read.
    """
    found = compare(AccessTrace.load(trace_file), cache_shares, sequences)
    print("cache  sequences  policy             hit rate  misses/token")
    for one in found:
        print(
            f"{one.cache_share:>5.1%} {one.sequences:>10}  {one.policy:<17}"
            f" {one.hit_rate:>9.3f} {one.misses_per_token:>13.1f}"
        )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    return found
