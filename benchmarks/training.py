"""``memplus bench train``: milliseconds of an optimiser step of a value table, ours and torch's."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.alternating import Contestant, median_seconds
from engine.errors import ConfigError
from memory_ops import operations
from memory_ops.anonymous import anonymous_zeros
from memory_ops.native.library import MEMORY_LIBRARY
from memory_ops.tables.trained import TableReads, TrainedTable
from weights.training.table_optimizer import TableOptimizer

TOKENS, HEADS, TOP_K, WIDTH = 1024, 4, 32, 256
LR = 1e-3
# the same for every table size, so that only the size differs
DISTINCT_ROWS = 2**16
TABLE_ROWS = (2**16, 2**18, 2**20, 2**22)
PEER_TABLE_ROWS = 2**20


@dataclass(frozen=True)
class Result:
    """One line of the table, one object of the JSON file.

    A step starts from the rows that tokens read, their weights and the gradient of their weighted
    sums, and ends with the updated table. Our steps also compute the norm of the gradients.
    """

    optimizer: str
    rows: int
    width: int
    tokens: int
    distinct_rows: int
    ms_per_step: float


@dataclass(frozen=True)
class TimedOptimizer:
    """An optimiser of a table of ``rows`` rows; ``step`` is the timed function."""

    name: str
    rows: int
    step: Callable[[TableReads], None]
    is_uniform: bool

    @property
    def distinct_rows(self) -> int:
        """Distinct rows that a step reads; for uniform reads the expected number."""
        if not self.is_uniform:
            return DISTINCT_ROWS
        return round(self.rows * (1 - (1 - 1 / self.rows) ** (TOKENS * HEADS * TOP_K)))

    def draw(self, count: int) -> list[tuple[TableReads]]:
        """New random reads for ``count`` steps."""
        return [(_reads(self.rows, self.is_uniform),) for _ in range(count)]


def measure(rounds: int, json_file: Path | None) -> None:
    """Print a line per optimiser and table size; write them as JSON.

    Raises:
        ConfigError: the native library is missing, or ``rounds`` is less than 1.
    """
    if MEMORY_LIBRARY.best_build is None:
        raise ConfigError("bench train: memplus was installed without its native library")
    if rounds < 1:
        raise ConfigError(f"rounds: must be at least 1, not {rounds}")
    print(f"rows of {WIDTH}, {TOKENS} tokens x {HEADS * TOP_K} reads, medians of {rounds} rounds")
    print("optimizer                rows  distinct   ms/step")
    results: list[Result] = []
    # optimisers of one group are timed interleaved; both groups do not fit in memory at once
    for group in (_optimizers_by_size, _optimizers_by_kind):
        for result in _timed(group(), rounds):
            results.append(result)
            tqdm.write(
                f"{result.optimizer:<18} {result.rows:>10} {result.distinct_rows:>9}"
                f" {result.ms_per_step:>9.2f}"
            )
        if json_file is not None:
            whole = json.dumps([asdict(result) for result in results], indent=1)
            json_file.write_text(whole + "\n")


def _optimizers_by_size() -> list[TimedOptimizer]:
    return [TimedOptimizer("sparse", rows, _sparse(rows), False) for rows in TABLE_ROWS]


def _optimizers_by_kind() -> list[TimedOptimizer]:
    makers: dict[str, Callable[[int], Callable[[TableReads], None]]] = {
        "sparse": _sparse,
        "sparse_row_wise": partial(_sparse, is_row_wise=True),
        "adamw": _adamw,
        "torch_sparse_adam": _torch_sparse_adam,
    }
    rows = PEER_TABLE_ROWS
    return [TimedOptimizer(name, rows, make(rows), True) for name, make in makers.items()]


def _timed(group: Sequence[TimedOptimizer], rounds: int) -> list[Result]:
    contestants = [Contestant(one.name, one.step, one.draw, calls=1) for one in group]
    timed = zip(group, median_seconds(contestants, rounds), strict=True)
    return [
        Result(one.name, one.rows, WIDTH, TOKENS, one.distinct_rows, seconds * 1e3)
        for one, seconds in timed
    ]


def _reads(num_rows: int, is_uniform: bool) -> TableReads:
    """Random reads: uniform, or of DISTINCT_ROWS evenly spaced rows, all equally often."""
    shape = (TOKENS, HEADS, TOP_K)
    if is_uniform:
        rows = torch.randint(0, num_rows, shape)
    else:
        count = TOKENS * HEADS * TOP_K
        places = torch.arange(count)[torch.randperm(count)] % DISTINCT_ROWS
        rows = (places * (num_rows // DISTINCT_ROWS)).view(shape)
    return TableReads(rows, torch.rand(shape), torch.randn(TOKENS, WIDTH))


def _table(num_rows: int) -> Tensor:
    """A table whose memory has been written, as in training."""
    return anonymous_zeros((num_rows, WIDTH), torch.float32).fill_(0.01)


def _sparse(num_rows: int, is_row_wise: bool = False) -> Callable[[TableReads], None]:
    table = TrainedTable(_table(num_rows))
    optimizer = TableOptimizer([table], is_row_wise=is_row_wise)
    for moments in optimizer.moments:
        for moment in moments:
            if moment is not None:
                moment.fill_(1e-6)

    def step(reads: TableReads) -> None:
        table.reads.append(reads)
        optimizer.collect()
        optimizer.step(LR)

    return step


def _adamw(num_rows: int) -> Callable[[TableReads], None]:
    table = torch.nn.Parameter(_table(num_rows))
    optimizer = torch.optim.AdamW([table], lr=LR, fused=True)

    def step(reads: TableReads) -> None:
        rows, sums = operations.row_gradients(*reads)
        table.grad = torch.zeros_like(table).index_copy_(0, rows, sums)
        optimizer.step()

    return step


def _torch_sparse_adam(num_rows: int) -> Callable[[TableReads], None]:
    table = torch.nn.Parameter(_table(num_rows))
    optimizer = torch.optim.SparseAdam([table], lr=LR)

    def step(reads: TableReads) -> None:
        rows, sums = operations.row_gradients(*reads)
        table.grad = torch.sparse_coo_tensor(
            rows.unsqueeze(0), sums, table.shape, is_coalesced=True, check_invariants=False
        )
        optimizer.step()  # type: ignore[no-untyped-call]

    return step
