"""``memplus bench train``: time of an optimiser step of a value table, ours and torch's."""

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.alternating import Contestant, median_seconds
from benchmarks.training_models import drawn_batch, timed_models, wait_for
from benchmarks.training_scale import CPU_SCALE, GPU_SCALE, TrainingScale
from engine.errors import ConfigError
from memory_ops import operations
from memory_ops.anonymous import anonymous_zeros
from memory_ops.native.library import MEMORY_LIBRARY
from memory_ops.tables.trained import TableReads, TrainedTable
from weights.training.new_model import placed_table
from weights.training.table_optimizer import TableOptimizer

HEADS, TOP_K = 4, 32
LR = 1e-3


@dataclass(frozen=True)
class Result:
    """One line of the table, one object of the JSON file.

    A step of an optimiser starts from the rows that tokens read, their weights and the gradient of
    their weighted sums, and ends with the updated table. Our steps also compute the norm of the
    gradients. A step of a model is a whole training step; it counts no distinct rows.
    """

    name: str
    device: str
    rows: int
    width: int
    tokens: int
    distinct_rows: int | None
    ms_per_step: float


@dataclass(frozen=True)
class Timed:
    """A timed step of ``tokens`` tokens, and what draws its input."""

    name: str
    rows: int
    width: int
    tokens: int
    step: Callable[..., None]
    draw: Callable[[], object]
    distinct_rows: int | None = None

    def inputs(self, count: int) -> list[tuple[object]]:
        """New random input for ``count`` steps."""
        return [(self.draw(),) for _ in range(count)]


def measure(
    rounds: int, json_file: Path | None, device: str = "cpu", scale: TrainingScale | None = None
) -> list[Result]:
    """Print a line per optimiser, table size and model; write them as JSON.

    If a group does not fit in the GPU's memory, the next one is timed.

    Raises:
        ConfigError: the native library or the GPU is missing, ``rounds`` is less than 1, or a group
            did not fit.
    """
    scale = scale or {"cpu": CPU_SCALE, "cuda": GPU_SCALE}[device]
    if device == "cpu" and MEMORY_LIBRARY.best_build is None:
        raise ConfigError("bench train: memplus was installed without its native library")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda needs a CUDA device, but none is available")
    if rounds < 1:
        raise ConfigError(f"rounds: must be at least 1, not {rounds}")
    print(f"{scale.tokens} tokens x {HEADS * TOP_K} reads, medians of {rounds} rounds")
    print(f"{'step':<20} {'rows':>10} {'width':>6} {'distinct':>9} {'ms/step':>9} {'tokens/s':>9}")
    results, too_large = list[Result](), list[str]()
    # steps of one group are timed interleaved; all groups do not fit in memory at once
    for title, make_group in _GROUPS.items():
        try:
            results += _timed(list(make_group(scale)), scale.device, rounds)
        except torch.OutOfMemoryError:
            too_large.append(title)
        # tables of one group would leave the next one too little memory
        gc.collect()
        if scale.device == "cuda":
            torch.cuda.empty_cache()
        if json_file is not None:
            whole = json.dumps([asdict(result) for result in results], indent=1)
            json_file.write_text(whole + "\n")
    if too_large:
        raise ConfigError(f"device: the GPU's memory is too small for {' and '.join(too_large)}")
    return results


def _timed(group: list[Timed], device: str, rounds: int) -> list[Result]:
    """Time the steps of a group, whose tables live until this returns; print a line each."""
    results = []
    contestants = [Contestant(one.name, one.step, one.inputs, calls=1) for one in group]
    for one, seconds in zip(group, median_seconds(contestants, rounds), strict=True):
        sizes = one.rows, one.width, one.tokens, one.distinct_rows
        results.append(Result(one.name, device, *sizes, seconds * 1e3))
        print(
            f"{one.name:<20} {one.rows:>10} {one.width:>6} {one.distinct_rows or '':>9}"
            f" {seconds * 1e3:>9.2f} {one.tokens / seconds:>9.0f}",
            flush=True,
        )
    return results


def _by_size(scale: TrainingScale) -> Iterator[Timed]:
    """Our optimiser for tables of all sizes, whose steps read equally many distinct rows."""
    for rows in scale.table_rows:
        step = _sparse(scale, rows, scale.width)
        draw = partial(_reads, scale, rows, scale.width, scale.distinct_rows)
        distinct = min(rows, scale.distinct_rows)
        yield Timed("sparse", rows, scale.width, scale.tokens, step, draw, distinct)


def _by_kind(scale: TrainingScale) -> Iterator[Timed]:
    """All optimisers for one table with uniform reads."""
    rows, width = scale.peer_rows, scale.peer_width
    makers: dict[str, Callable[[TrainingScale, int, int], Callable[[TableReads], None]]] = {
        "sparse": _sparse,
        "sparse_bf16_moments": partial(_sparse, moment_dtype=torch.bfloat16),
        "sparse_row_wise": partial(_sparse, is_row_wise=True),
        "adamw": _adamw,
        "torch_sparse_adam": _torch_sparse_adam,
    }
    if scale.device == "cuda":
        makers["sparse_host"] = partial(_sparse, table_tier="host")
    expected = rows * (1 - (1 - 1 / rows) ** (scale.tokens * HEADS * TOP_K))
    draw = partial(_reads, scale, rows, width, None)
    for name, make in makers.items():
        step = make(scale, rows, width)
        yield Timed(name, rows, width, scale.tokens, step, draw, round(expected))


def _models(scale: TrainingScale) -> Iterator[Timed]:
    """Whole models."""
    if scale.model is None:
        return
    for name, step in timed_models(scale).items():
        rows = 0 if name.startswith("dense") else scale.peer_rows
        draw = partial(drawn_batch, scale)
        yield Timed(name, rows, scale.model.hidden_size, scale.model_tokens, step, draw)


def _reads(
    scale: TrainingScale, num_rows: int, width: int, distinct_rows: int | None
) -> TableReads:
    """Random reads: uniform, or of evenly spaced rows, all equally often."""
    shape, device = (scale.tokens, HEADS, TOP_K), scale.device
    if distinct_rows is None:
        rows = torch.randint(0, num_rows, shape, device=device)
    else:
        count, distinct = scale.tokens * HEADS * TOP_K, min(num_rows, distinct_rows)
        places = torch.randperm(count, device=device) % distinct
        rows = (places * (num_rows // distinct)).view(shape)
    grad_TV = torch.randn(scale.tokens, width, device=device)
    return TableReads(rows, torch.rand(shape, device=device), grad_TV)


def _table(scale: TrainingScale, num_rows: int, width: int) -> Tensor:
    """A table whose memory has been written, as in training."""
    if scale.device != "cpu":
        return torch.full((num_rows, width), 0.01, device=scale.device)
    return anonymous_zeros((num_rows, width), torch.float32).fill_(0.01)


def _sparse(
    scale: TrainingScale,
    num_rows: int,
    width: int,
    *,
    is_row_wise: bool = False,
    moment_dtype: torch.dtype = torch.float32,
    table_tier: str = "device",
) -> Callable[[TableReads], None]:
    if table_tier == "host":
        rows_RV = anonymous_zeros((num_rows, width), torch.float32).fill_(0.01)
        table = placed_table(rows_RV, scale.device, table_tier)
    else:
        table = TrainedTable(_table(scale, num_rows, width))
    optimizer = TableOptimizer([table], is_row_wise=is_row_wise, moment_dtype=moment_dtype)
    for moments in optimizer.moments:
        for moment in moments:
            if moment is not None:
                moment.fill_(1e-6)

    def step(reads: TableReads) -> None:
        if table_tier == "host":  # the lookup that a model makes before
            table.start(reads.rows_THK, reads.weights_THK)
        table.record(reads)
        optimizer.collect()
        optimizer.step(LR)
        table.synchronize()
        wait_for(scale.device)

    return step


def _adamw(scale: TrainingScale, num_rows: int, width: int) -> Callable[[TableReads], None]:
    table = torch.nn.Parameter(_table(scale, num_rows, width))
    optimizer = torch.optim.AdamW([table], lr=LR, fused=True)

    def step(reads: TableReads) -> None:
        rows, sums = operations.row_gradients(*reads)
        table.grad = torch.zeros_like(table).index_copy_(0, rows, sums)
        optimizer.step()
        wait_for(scale.device)

    return step


def _torch_sparse_adam(
    scale: TrainingScale, num_rows: int, width: int
) -> Callable[[TableReads], None]:
    table = torch.nn.Parameter(_table(scale, num_rows, width))
    optimizer = torch.optim.SparseAdam([table], lr=LR)

    def step(reads: TableReads) -> None:
        rows, sums = operations.row_gradients(*reads)
        table.grad = torch.sparse_coo_tensor(
            rows.unsqueeze(0), sums, table.shape, is_coalesced=True, check_invariants=False
        )
        optimizer.step()  # type: ignore[no-untyped-call]
        wait_for(scale.device)

    return step


# whose tables and models live at the same time
_GROUPS = {
    "tables of all sizes": _by_size,
    "the optimisers": _by_kind,
    "the models": _models,
}
