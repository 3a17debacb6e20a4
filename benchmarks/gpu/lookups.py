"""Part lookups: microseconds of memory lookups alone, by place and format of the table."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import kernel_peers
from benchmarks.gpu.card_limits import CardLimits
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.graph_timing import replayed_us
from benchmarks.gpu.part import PartSetup, Task
from benchmarks.kernel_shapes import Shapes
from benchmarks.memory_variant import MEMORY_LAYERS
from benchmarks.row_trace import AccessTrace, checked_trace
from engine.errors import ConfigError

TOKENS = (1, 8, 32, 256)
DTYPES = ("bf16", "int8", "int4")
SKEWS = ("uniform", "recorded")


def checked_lookups(shapes: Shapes, trace_file: Path) -> AccessTrace:
    """The trace, if these shapes can be measured with it.

    Raises:
        ConfigError: the number of rows is not a power of two, or the trace is too short.
        DataError: the file is not a trace, or the trace has other numbers of layers or heads.
    """
    if shapes.num_rows & (shapes.num_rows - 1):
        raise ConfigError(f"num_subkeys: {shapes.num_subkeys} is not a power of two")
    trace = checked_trace(trace_file, (MEMORY_LAYERS, shapes.num_heads, shapes.top_k))
    if len(trace.rows_TMHK) < 4 * max(TOKENS):
        # one half of the trace warms the cache; the other half must fill at least two replays
        raise ConfigError(f"trace: {trace_file} has fewer than {4 * max(TOKENS)} tokens")
    return trace


def tasks(setup: PartSetup) -> Iterator[Task]:
    """A task per format of the rows, and one for the choice of rows."""
    from benchmarks.gpu.lookup_tiers import names_of

    trace = checked_lookups(setup.shapes, setup.trace_file)
    for dtype in DTYPES:
        points = [(skew, tokens) for skew in SKEWS for tokens in TOKENS]
        names = [name for point in points for name in names_of(setup.shapes, dtype, *point)]
        yield Task(tuple(names), partial(_gathers, setup, trace, dtype))
    names = [
        f"topk {backend} {tokens} tokens of {setup.shapes.num_rows} rows"
        for tokens in TOKENS
        for backend in ("triton", "torch")
    ]
    yield Task(tuple(names), partial(_topk, setup.shapes, setup.limits))


def _gathers(
    setup: PartSetup, trace: AccessTrace, dtype: str, wanted: Sequence[str]
) -> Iterator[Figure]:
    from benchmarks.gpu.lookup_tiers import Tiers, names_of

    tiers = Tiers(setup.shapes, dtype, setup.cache_share, trace, setup.limits)
    for skew in SKEWS:
        for tokens in TOKENS:
            if set(names_of(setup.shapes, dtype, skew, tokens)) & set(wanted):
                yield from tiers.figures(skew, tokens)


def _topk(shapes: Shapes, limits: CardLimits, wanted: Sequence[str]) -> Iterator[Figure]:
    from memory_ops import triton_kernels

    by = {"triton": triton_kernels.product_topk, "torch": kernel_peers.product_topk}
    for name in wanted:
        _, backend, tokens, *_ = name.split()
        score_shape = (8, int(tokens), shapes.num_heads, 2, shapes.num_subkeys)
        scores = torch.empty(score_shape, device="cuda")
        calls = [partial(by[backend], one, shapes.top_k) for one in scores]
        us = replayed_us(calls, shapes.rounds, partial(_draw, scores))
        yield Figure(name, us, "us", scores[0].nbytes / limits.device / 1e3)


def _draw(scores: Tensor, number: int) -> None:
    scores.normal_()
