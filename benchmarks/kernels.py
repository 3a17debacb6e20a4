"""``memplus bench kernels``: microseconds per token of memory operations on the CPU."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from benchmarks import kernel_peers
from benchmarks.alternating import Contestant, median_seconds
from benchmarks.drawn_tables import DTYPES, PLAIN, drawn_rows, repeated
from benchmarks.kernel_shapes import Shapes
from benchmarks.read_limits import (
    read_library,
    row_limit,
    row_readers,
    sequential_limit,
    sequential_reader,
)
from engine.errors import ConfigError
from memory_ops.checks import Table
from memory_ops.native.backend import MAX_SUBKEYS, MAX_TOP_K, NativeBackend
from memory_ops.native.library import MEMORY_LIBRARY
from memory_ops.row_formats import RowFormat, RowRecords
from server.allocator import keep_freed_memory

TOKENS = (1, 16, 256)
GRADIENT_TOKENS = 1024
# the same for every table size, so that only the size differs
DISTINCT_ROWS = 2**14
GRADIENT_TABLES = (2**14, 2**16, 2**18, 2**20, 2**22)


@dataclass(frozen=True)
class Result:
    """One line of the table, one object of the JSON file.

    Every backend gets the inputs of a memory layer, int64 rows and fp32 weights; conversions that
    it needs are timed. ``gb_per_s`` counts the scores or rows read, for every backend at the size
    at which memplus stores them, or the gradients written by the backward pass. The limit is the
    rate of random row reads for operations that read rows, else that of sequential reads.
    """

    op: str
    backend: str
    tokens: int
    rows: int
    width: int
    dtype: str
    us_per_token: float
    gb_per_s: float
    limit_gb_per_s: float


@dataclass(frozen=True)
class TimedTable:
    """A random table on huge pages, as memplus loads it, and its bytes on 4 kB pages."""

    dtype: str
    table: Table
    rows_RB: Tensor
    small_pages_RB: Tensor

    @classmethod
    def random(cls, dtype: str, num_rows: int, width: int) -> "TimedTable":
        """A table of random rows."""
        part_PB = drawn_rows(dtype, width)
        rows_RB = repeated(part_PB, num_rows)
        plain = dtype in PLAIN
        table = rows_RB if plain else RowRecords(rows_RB, cast(RowFormat, dtype), width)
        return cls(dtype, table, rows_RB, repeated(part_PB, num_rows, huge_pages=False))


def measure(shapes: Shapes, json_file: Path | None) -> None:
    """Print a line per operation, dtype, number of tokens and backend; write them as JSON.

    Raises:
        ConfigError: the native library is missing or does not support these shapes.
    """
    build = MEMORY_LIBRARY.best_build
    if build is None:
        raise ConfigError("bench kernels: memplus was installed without its native library")
    for name, number, most in (
        ("num_subkeys", shapes.num_subkeys, MAX_SUBKEYS),
        ("top_k", shapes.top_k, MAX_TOP_K),
    ):
        if number > most:
            raise ConfigError(f"{name}: the kernels support at most {most}, not {number}")
    keep_freed_memory()
    table = f"{shapes.num_rows} rows of {shapes.width}, {shapes.num_heads} heads x {shapes.top_k}"
    timing = f"{torch.get_num_threads()} threads, medians of {shapes.rounds} rounds"
    print(f"{table}, build {build}, {timing}")
    print("op        dtype  tokens     rows  backend   us/token    GB/s   limit  share  x torch")
    results: list[Result] = []
    for group in _Benchmark(shapes, build).groups():
        results += group
        torch_us = [result.us_per_token for result in group if result.backend == "torch"]
        for result in group:
            print(_line(result, torch_us), flush=True)
        if json_file is not None:
            whole = json.dumps([asdict(result) for result in results], indent=1)
            json_file.write_text(whole + "\n")


def _line(result: Result, torch_us: Sequence[float]) -> str:
    share = result.gb_per_s / result.limit_gb_per_s
    ratio = f"{torch_us[0] / result.us_per_token:9.2f}" if torch_us else ""
    return (
        f"{result.op:<9} {result.dtype:<5} {result.tokens:>7} {result.rows:>8}  {result.backend:<7}"
        f" {result.us_per_token:>10.2f} {result.gb_per_s:>7.1f} {result.limit_gb_per_s:>7.1f}"
        f" {share:>6.2f}{ratio}"
    )


class _Benchmark:
    def __init__(self, shapes: Shapes, build: str) -> None:
        self._shapes = shapes
        # as the engine calls it: torch's dispatcher would add 30 to 80 us to a call
        self._native = NativeBackend(build)
        self._library = read_library()

    def groups(self) -> Iterator[list[Result]]:
        """Results in groups that are timed together: one operation, dtype and number of tokens."""
        for tokens in TOKENS:
            yield self._topk(tokens)
        for dtype in DTYPES:
            timed = TimedTable.random(dtype, self._shapes.num_rows, self._shapes.width)
            peers = kernel_peers.gathers(timed.table, dtype)
            for tokens in TOKENS:
                yield self._gather(timed, peers, tokens)
            if dtype == "bf16":
                for tokens in TOKENS:
                    yield self._lookup(timed, peers["torch"], tokens)
        for num_rows in GRADIENT_TABLES:
            yield self._backward(num_rows)

    def _topk(self, tokens: int) -> list[Result]:
        top_k = self._shapes.top_k
        calls: dict[str, Callable[[Tensor], object]] = {
            "native": lambda scores: self._native.product_topk(scores, top_k),
            "torch": lambda scores: kernel_peers.product_topk(scores, top_k),
        }
        contestants = self._score_contestants(calls, tokens)
        score_bytes = 4 * tokens * self._shapes.num_heads * 2 * self._shapes.num_subkeys
        return self._with_sequential_limit("topk", tokens, contestants, score_bytes)

    def _gather(
        self, timed: TimedTable, peers: Mapping[str, kernel_peers.Gather], tokens: int
    ) -> list[Result]:
        def inputs(calls: int) -> list[tuple[Tensor, Tensor]]:
            shape = self._shapes.per_row_shape(calls, tokens)
            rows = torch.randint(0, self._shapes.num_rows, shape)
            return list(zip(rows, torch.rand(shape), strict=True))

        def native(rows_THK: Tensor, weights_THK: Tensor) -> object:
            return self._native.gather_rows(timed.table, rows_THK, weights_THK)

        calls = {"native": native, **peers}
        contestants = [Contestant(*item, inputs, _num_calls(tokens)) for item in calls.items()]
        return self._with_row_limit("gather", timed, tokens, contestants)

    def _lookup(self, timed: TimedTable, bag: kernel_peers.Gather, tokens: int) -> list[Result]:
        table, top_k = timed.table, self._shapes.top_k
        calls: dict[str, Callable[[Tensor], object]] = {
            "native": lambda scores: self._native.gather_rows(
                table, *self._native.product_topk(scores, top_k)
            ),
            "torch": lambda scores: bag(*kernel_peers.product_topk(scores, top_k)),
        }
        return self._with_row_limit("lookup", timed, tokens, self._score_contestants(calls, tokens))

    def _backward(self, num_rows: int) -> list[Result]:
        shape = self._shapes.per_row_shape(GRADIENT_TOKENS)
        count = shape[0] * shape[1] * shape[2]
        distinct = torch.arange(DISTINCT_ROWS) * (num_rows // DISTINCT_ROWS)
        references = distinct.repeat(-(-count // DISTINCT_ROWS))[:count]

        def inputs(calls: int) -> list[tuple[Tensor, Tensor, Tensor]]:
            grads = torch.randn(calls, GRADIENT_TOKENS, self._shapes.width)
            shuffled = [references[torch.randperm(count)].view(shape) for _ in range(calls)]
            return list(zip(shuffled, torch.rand(calls, *shape), grads, strict=True))

        def by_torch(rows: Tensor, weights: Tensor, grad: Tensor) -> object:
            return kernel_peers.row_gradients(rows, weights, grad, num_rows)

        calls = {"native": self._native.row_gradients, "torch": by_torch}
        contestants = [Contestant(*item, inputs, 1) for item in calls.items()]
        written = 4 * min(count, DISTINCT_ROWS) * self._shapes.width
        results = self._with_sequential_limit("backward", GRADIENT_TOKENS, contestants, written)
        return [replace(result, rows=num_rows) for result in results]

    def _score_contestants(
        self, calls: Mapping[str, Callable[[Tensor], object]], tokens: int
    ) -> list[Contestant]:
        def inputs(count: int) -> list[tuple[Tensor]]:
            shape = (count, tokens, self._shapes.num_heads, 2, self._shapes.num_subkeys)
            return [(scores,) for scores in torch.randn(shape)]

        return [Contestant(*item, inputs, _num_calls(tokens)) for item in calls.items()]

    def _with_row_limit(
        self, op: str, timed: TimedTable, tokens: int, contestants: list[Contestant]
    ) -> list[Result]:
        readers = row_readers(self._library, (timed.rows_RB, timed.small_pages_RB))
        seconds = median_seconds([*contestants, *readers], self._shapes.rounds)
        limit = row_limit(seconds[len(contestants) :], timed.rows_RB)
        num_bytes = tokens * self._shapes.num_heads * self._shapes.top_k * timed.rows_RB[0].nbytes
        return self._results(op, timed.dtype, tokens, contestants, seconds, num_bytes, limit)

    def _with_sequential_limit(
        self, op: str, tokens: int, contestants: list[Contestant], num_bytes: int
    ) -> list[Result]:
        reader = sequential_reader(self._library)
        seconds = median_seconds([*contestants, reader], self._shapes.rounds)
        limit = sequential_limit(seconds[-1])
        return self._results(op, "fp32", tokens, contestants, seconds, num_bytes, limit)

    def _results(
        self,
        op: str,
        dtype: str,
        tokens: int,
        contestants: Sequence[Contestant],
        seconds: Sequence[float],
        num_bytes: int,
        limit: float,
    ) -> list[Result]:
        return [
            Result(
                op=op,
                backend=contestant.name,
                tokens=tokens,
                rows=self._shapes.num_rows,
                width=self._shapes.width,
                dtype=dtype,
                us_per_token=taken * 1e6 / tokens,
                gb_per_s=num_bytes / taken / 1e9,
                limit_gb_per_s=limit,
            )
            for contestant, taken in zip(contestants, seconds, strict=False)
        ]


def _num_calls(tokens: int) -> int:
    """Calls per measurement: enough that the first, slower ones do not matter."""
    return max(32, 2048 // tokens)
