"""``memplus bench gpu``: microseconds of memory lookups on a GPU, by memory tier."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks import kernel_peers
from benchmarks.access_trace import AccessTrace, checked_trace
from benchmarks.gpu_result import GpuResult
from benchmarks.graph_timing import CopyLimits, replayed_us
from benchmarks.kernel_shapes import Shapes
from benchmarks.random_memory import MEMORY_LAYERS
from engine.errors import ConfigError

TOKENS = (1, 8, 32, 256)
DTYPES = ("bf16", "int8", "int4")
SKEWS = ("uniform", "recorded")


def measure(shapes: Shapes, trace_file: Path, cache_share: float, json_file: Path | None) -> None:
    """Print a line per operation, tier, skew, dtype and number of tokens; write them as JSON.

    Raises:
        ConfigError: torch finds no GPU, the number of rows is not a power of two, ``cache_share``
            is invalid or too small, the trace is too short, or the file's folder does not exist.
        DataError: the file is not a trace, or the trace has other numbers of layers or heads.
    """
    if not torch.cuda.is_available():
        raise ConfigError("bench gpu: torch finds no CUDA device")
    if not 0 < cache_share <= 1:
        raise ConfigError(f"cache_share: {cache_share} is not in (0, 1]")
    if shapes.num_rows & (shapes.num_rows - 1):
        raise ConfigError(f"num_subkeys: {shapes.num_subkeys} is not a power of two")
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"json: folder {json_file.parent} does not exist")
    trace = checked_trace(trace_file, (MEMORY_LAYERS, shapes.num_heads, shapes.top_k))
    if len(trace.rows_TMHK) < 4 * max(TOKENS):
        # one half of the trace warms the cache; the other half must fill at least two replays
        raise ConfigError(f"trace: {trace_file} has fewer than {4 * max(TOKENS)} tokens")
    limits = CopyLimits.measured(shapes.rounds)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copies {limits.device:.0f}"
        f" GB/s on the device, {limits.bus:.1f} from the host\n"
        f"{shapes.num_rows} rows of {shapes.width},"
        f" {shapes.num_heads} heads x {shapes.top_k}, cache {cache_share:.0%} of their bytes,"
        f" medians of up to {shapes.rounds} replays\n"
        "op     tier   backend skew     dtype tokens       us     GB/s    limit  share hits"
    )
    results: list[GpuResult] = []
    for result in _results(shapes, limits, trace, cache_share):
        results.append(result)
        print(_line(result), flush=True)
        if json_file is not None:
            whole = json.dumps([asdict(result) for result in results], indent=1)
            json_file.write_text(whole + "\n")


def _line(result: GpuResult) -> str:
    hits = "" if result.hit_rate is None else f"{result.hit_rate:.2f}"
    return (
        f"{result.op:<6} {result.tier:<6} {result.backend:<7} {result.skew:<8} {result.dtype:<5}"
        f" {result.tokens:>6} {result.us:>8.1f} {result.gb_per_s:>8.1f}"
        f" {result.limit_gb_per_s:>8.1f} {result.gb_per_s / result.limit_gb_per_s:>6.2f} {hits}"
    )


def _results(
    shapes: Shapes, limits: CopyLimits, trace: AccessTrace, cache_share: float
) -> Iterator[GpuResult]:
    # this module imports triton
    from benchmarks.gpu_tiers import Tiers

    for dtype in DTYPES:
        tiers = Tiers(shapes, dtype, cache_share, trace)
        for skew in SKEWS:
            for tokens in TOKENS:
                yield from tiers.results(limits, skew, tokens)
        del tiers  # frees its memory before the next is allocated
    for tokens in TOKENS:
        yield from _topk(shapes, limits, tokens)


def _topk(shapes: Shapes, limits: CopyLimits, tokens: int) -> Iterator[GpuResult]:
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
        yield GpuResult(
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
            device=torch.cuda.get_device_name(),
            replays=shapes.rounds,
        )
