"""Microseconds of memory lookups on a GPU: table in its memory, in host memory, and cached there.

All is captured in CUDA graphs, so that the host's time to launch does not count, and every replay
has fresh rows.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from benchmarks import kernel_peers
from benchmarks.access_trace import AccessTrace
from benchmarks.drawn_tables import PLAIN, drawn_rows
from benchmarks.graph_timing import CopyLimits, replayed_us
from benchmarks.kernel_shapes import Shapes
from benchmarks.memory.access import DrawnAccess, RecordedAccess, RowAccess
from benchmarks.read_limits import repeated
from engine.config import ConfigError
from memory_ops import RowRecords
from memory_ops.checks import Table
from memory_ops.row_formats import RowFormat
from memory_ops.tables.host import HostTable, host_table

TOKENS = (1, 8, 32, 256)
DTYPES = ("bf16", "int8", "int4")
SKEWS = ("uniform", "recorded")
# of tokens, before anything is timed; then those of each replay
_WARM_UP_TOKENS = 1024
_REPLAYED_TOKENS = 512

Lookup = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Result:
    """One line of the table, one object of the JSON file.

    Attributes:
        op: ``topk`` of scores, or ``gather``, whose rows and weights are there.
        tier: ``device``; ``host``, read where it is; ``cached``, the host tier.
        us: of one memory layer, for all tokens.
        gb_per_s: of the rows that the tokens read, repeats included; of a topk, of the scores.
        limit_gb_per_s: of a copy: what the device reads and writes, or what it is sent by the host.
        hit_rate: of the cache, of distinct rows.
    """

    op: str
    tier: str
    backend: str
    skew: str
    tokens: int
    rows: int
    width: int
    dtype: str
    us: float
    gb_per_s: float
    limit_gb_per_s: float
    hit_rate: float | None = None


def measure(shapes: Shapes, trace_file: Path, cache_share: float, json_file: Path | None) -> None:
    """Print a line for every operation, tier, skew, dtype and number of tokens; write them as JSON.

    Raises:
        ConfigError: torch finds no GPU, the trace is of other heads, the cache is no share, or the
            file has no folder.
        DataError: the trace is something else.
    """
    if not torch.cuda.is_available():
        raise ConfigError("bench gpu: torch finds no CUDA device")
    if not 0 < cache_share <= 1:
        raise ConfigError(f"cache_share: {cache_share} is not in (0, 1]")
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"json: there is no folder {json_file.parent}")
    trace = AccessTrace.load(trace_file)
    if trace.rows_TMHK.shape[2:] != shapes.each_row():
        raise ConfigError(f"trace: {trace_file} has heads x rows {trace.rows_TMHK.shape[2:]}")
    limits = CopyLimits.measured(shapes.rounds)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copies {limits.device:.0f}"
        f" GB/s within, {limits.bus:.1f} from the host\n{shapes.num_rows} rows of {shapes.width},"
        f" {shapes.num_heads} heads x {shapes.top_k}, cache {cache_share:.0%}, medians of"
        f" {shapes.rounds} replays\n"
        "op     tier   backend skew     dtype tokens       us     GB/s    limit  share hits"
    )
    results: list[Result] = []
    for result in _results(shapes, limits, trace, cache_share):
        results.append(result)
        print(_line(result), flush=True)
        if json_file is not None:
            whole = json.dumps([asdict(result) for result in results], indent=1)
            json_file.write_text(whole + "\n")


def _line(result: Result) -> str:
    hits = "" if result.hit_rate is None else f"{result.hit_rate:.2f}"
    return (
        f"{result.op:<6} {result.tier:<6} {result.backend:<7} {result.skew:<8} {result.dtype:<5}"
        f" {result.tokens:>6} {result.us:>8.1f} {result.gb_per_s:>8.1f}"
        f" {result.limit_gb_per_s:>8.1f} {result.gb_per_s / result.limit_gb_per_s:>6.2f} {hits}"
    )


def _results(
    shapes: Shapes, limits: CopyLimits, trace: AccessTrace, cache_share: float
) -> Iterator[Result]:
    for tokens in TOKENS:
        yield from _topk(shapes, limits, tokens)
    heads = shapes.each_row()
    access: dict[str, RowAccess] = {
        "uniform": DrawnAccess(shapes.num_rows, (heads[0], heads[1]), is_zipf=False),
        "recorded": RecordedAccess(trace, shapes.num_rows),
    }
    for dtype in DTYPES:
        rows_RB = repeated(drawn_rows(dtype, shapes.width), shapes.num_rows)
        timed = _Tiers(shapes, dtype, rows_RB, cache_share)
        for skew in SKEWS:
            timed.warm_up(access[skew])
            for tokens in TOKENS:
                yield from timed.results(limits, skew, access[skew], tokens)
        timed.close()


def _topk(shapes: Shapes, limits: CopyLimits, tokens: int) -> Iterator[Result]:
    from memory_ops import triton_kernels

    score_shape = (8, tokens, shapes.num_heads, 2, shapes.num_subkeys)
    scores = torch.empty(score_shape, device="cuda")
    by = {"triton": triton_kernels.product_topk, "torch": kernel_peers.product_topk}
    for backend, choose in by.items():
        us = replayed_us(
            [partial(choose, one, shapes.top_k) for one in scores],
            shapes.rounds,
            lambda number: scores.normal_(),
        )
        yield Result(
            op="topk",
            tier="",
            backend=backend,
            skew="",
            tokens=tokens,
            rows=shapes.num_rows,
            width=shapes.width,
            dtype="fp32",
            us=us,
            gb_per_s=scores[0].nbytes / us / 1e3,
            limit_gb_per_s=limits.device,
        )


class _Tiers:
    """One table in all tiers: its rows on the host, a copy of them on the device, and a cache."""

    def __init__(self, shapes: Shapes, dtype: str, rows_RB: Tensor, cache_share: float) -> None:
        self._shapes, self._dtype = shapes, dtype
        table = self._table(rows_RB)
        self._row_bytes = rows_RB[0].nbytes
        self._there = self._table(rows_RB.cuda())
        cache_bytes = int(rows_RB.nbytes * cache_share)
        self._cached: HostTable = host_table(table, cache_bytes, torch.device("cuda", 0))

    def _table(self, rows_RB: Tensor) -> Table:
        if self._dtype in PLAIN:
            return rows_RB
        return RowRecords(rows_RB, cast(RowFormat, self._dtype), self._shapes.width)

    def close(self) -> None:
        """Unlock the rows."""
        self._cached.close()

    def warm_up(self, access: RowAccess) -> None:
        """Have the cache hold what is read often."""
        tokens = 8
        weights = torch.rand(self._shapes.each_row(tokens), device="cuda")
        for rows_CTHK in self._drawn(access, tokens, 0, _WARM_UP_TOKENS // tokens, warm_up=True):
            self._cached.start(rows_CTHK, weights).finish()

    def results(
        self, limits: CopyLimits, skew: str, access: RowAccess, tokens: int
    ) -> Iterator[Result]:
        """Time the lookups of some tokens by every tier, and torch's bag beside them."""
        from memory_ops import triton_kernels

        calls = max(3, _REPLAYED_TOKENS // tokens)
        drawn = [
            self._drawn(access, tokens, number * calls, calls)
            for number in range(self._shapes.rounds + 1)
        ]
        there, cached = self._there, self._cached
        by: dict[tuple[str, str], Lookup] = {
            ("device", "triton"): lambda rows, weights: triton_kernels.gather_rows(
                there, rows, weights
            ),
            ("host", "triton"): lambda rows, weights: triton_kernels.gather_rows(
                cached.rows, rows, weights
            ),
            ("cached", "triton"): lambda rows, weights: cached.start(rows, weights).finish(),
        }
        if isinstance(there, Tensor):
            by["device", "torch"] = kernel_peers.gathers(there, self._dtype)["torch"]
        for (tier, backend), look_up in by.items():
            cached.join()
            before = cached.statistics().get(0)
            us = self._us(look_up, drawn)
            hit_rate = None
            if tier == "cached" and before is not None:
                after = cached.statistics()[0]
                hits = after.hits - before.hits
                hit_rate = hits / (after.unique_rows - before.unique_rows)
            yield Result(
                op="gather",
                tier=tier,
                backend=backend,
                skew=skew,
                tokens=tokens,
                rows=self._shapes.num_rows,
                width=self._shapes.width,
                dtype=self._dtype,
                us=us,
                gb_per_s=drawn[0][0].numel() * self._row_bytes / us / 1e3,
                limit_gb_per_s=limits.device if tier == "device" else limits.bus,
                hit_rate=hit_rate,
            )

    def _us(self, look_up: Lookup, drawn: Sequence[Tensor]) -> float:
        rows_CTHK = drawn[0].clone()
        weights_CTHK = torch.rand(rows_CTHK.shape, device="cuda")
        lookups = [
            partial(look_up, rows, weights)
            for rows, weights in zip(rows_CTHK, weights_CTHK, strict=True)
        ]
        return replayed_us(
            lookups, self._shapes.rounds, lambda number: rows_CTHK.copy_(drawn[number])
        )

    def _drawn(
        self, access: RowAccess, tokens: int, first: int, calls: int, *, warm_up: bool = False
    ) -> Tensor:
        """Rows of successive calls: one layer after another, each of so many sequences' tokens."""
        rows = [
            access.rows(sequence, (first + call) // 3, (first + call) % 3, warm_up=warm_up)
            for call in range(calls)
            for sequence in range(tokens)
        ]
        return torch.stack(rows).view(self._shapes.each_row(calls, tokens)).cuda()
