"""Budgets of the attention kernels: registers, shared memory, spills, loads of 128 bits."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.executors.cuda.kernels import attention_kernels, paged_attention
from engine.executors.cuda.kernels.attention_launch import (
    CHUNK_LAUNCHES,
    DECODE_LAUNCHES,
    LARGE_PREFILL_LAUNCHES,
    PREFILL_LAUNCHES,
    AttentionLaunch,
)
from engine.executors.cuda.kernels.paged_step import PagedStep
from engine.executors.cuda.kernels.rotate_and_store import rotate_and_store
from memory_ops.anonymous import anonymous_zeros
from tests.kernel_tools.machine_code import TARGETS, all_compiled, check, compiled, per_target

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
BLOCK_SIZE = 16
# of steps that are no bucket of decodes
MIXED_SPLITS = 4
# AMD uses other loads from this size on
VAST_BYTES = 2**31

# by dtype, dtype of the blocks, E, H and G: upper limits (registers per lane, shared bytes per
# program) of decode, short chunks and prefill for each of TARGETS, with the compiler that
# constraints.txt names
ATTENTION_BUDGETS = {
    ("bf16", "bf16", 64, 9, 3): (
        ((72, 53248), (232, 40960), (184, 49152)),
        ((72, 53248), (168, 57344), (128, 65536)),
        ((72, 53248), (168, 57856), (152, 66560)),
        ((168, 24576), (192, 40960), (176, 49152)),
    ),
    ("bf16", "bf16", 128, 32, 8): (
        ((120, 71680), (256, 53248), (192, 65536)),
        ((120, 71680), (160, 65536), (160, 81920)),
        ((120, 71680), (168, 66048), (176, 82944)),
        ((184, 65536), (192, 36864), (184, 40960)),
    ),
}
SLOW_ATTENTION_BUDGETS = {
    ("bf16", "bf16", 80, 32, 32): (
        ((96, 71680), (80, 37888), (128, 43008)),
        ((120, 71680), (80, 37888), (104, 43008)),
        ((120, 71680), (80, 37888), (104, 43008)),
        ((184, 65536), (120, 32768), (152, 32768)),
    ),
    ("bf16", "bf16", 128, 64, 4): (
        ((120, 71680), (168, 53248), (192, 65536)),
        ((120, 71680), (128, 65536), (160, 81920)),
        ((120, 71680), (168, 66048), (176, 82944)),
        ((184, 65536), (192, 36864), (184, 40960)),
    ),
    ("bf16", "bf16", 256, 8, 1): (
        ((152, 74752), (176, 51200), (200, 51200)),
        ((152, 74752), (128, 65536), (152, 65536)),
        ((152, 74752), (136, 66560), (136, 66560)),
        ((192, 65536), (152, 32768), (144, 32768)),
    ),
    ("bf16", "fp8", 64, 9, 3): (
        ((96, 28672), (232, 24576), (192, 32768)),
        ((120, 28672), (168, 32768), (128, 40960)),
        ((120, 28672), (168, 41472), (152, 49664)),
        ((160, 8192), (168, 24576), (232, 32768)),
    ),
    ("bf16", "fp8", 256, 8, 1): (
        ((208, 41984), (208, 43008), (232, 43008)),
        ((168, 41984), (144, 65536), (208, 49152)),
        ((168, 41984), (184, 57856), (152, 57856)),
        ((152, 32768), (144, 32768), (176, 32768)),
    ),
    ("fp16", "fp16", 128, 32, 8): (
        ((120, 71680), (256, 53248), (192, 65536)),
        ((120, 71680), (160, 65536), (160, 81920)),
        ((120, 71680), (168, 66048), (176, 82944)),
        ((184, 65536), (192, 36864), (184, 40960)),
    ),
    ("fp16", "fp8", 128, 32, 8): (
        ((168, 38912), (256, 36864), (184, 49152)),
        ((168, 38912), (160, 40960), (168, 57344)),
        ((168, 38912), (168, 49664), (168, 66048)),
        ((176, 32768), (168, 20480), (184, 32768)),
    ),
    ("fp32", "fp32", 64, 9, 3): (
        ((64, 39424), (112, 57856), (128, 57856)),
        ((64, 39424), (112, 57856), (256, 57856)),
        ((64, 39424), (104, 57856), (248, 57856)),
        ((120, 34816), (136, 40960), (128, 40960)),
    ),
    ("fp32", "fp32", 128, 32, 8): (
        ((72, 42496), (88, 53760), (64, 51712)),
        ((80, 42496), (96, 53760), (80, 51712)),
        ((80, 42496), (88, 53760), (80, 51712)),
        ((128, 33792), (104, 32768), (120, 34816)),
    ),
    ("bf16", "fp8", 128, 32, 8): (
        ((168, 38912), (256, 36864), (256, 49152)),
        ((168, 38912), (160, 40960), (168, 57344)),
        ((168, 38912), (168, 49664), (176, 66048)),
        ((152, 32768), (160, 20480), (232, 32768)),
    ),
}
# of prefill on sm_90 and sm_100
LARGE_PREFILL_BUDGETS = {
    ("bf16", "bf16", 256, 8, 1): ((224, 163840), (208, 165376)),
    ("bf16", "fp8", 256, 8, 1): ((240, 98304), (168, 131584)),
    ("bf16", "bf16", 128, 32, 8): ((208, 131072), (224, 132096)),
    ("bf16", "fp8", 128, 32, 8): ((240, 81920), (240, 98816)),
}
# by E, of short chunks on all targets
CHUNK_COMBINE_BUDGETS = {64: (56, 2048), 128: (88, 8192), 256: (168, 16384)}
# by E and the number of splits
COMBINE_BUDGETS = {
    (128, 16): ((32, 2048), (32, 2048), (32, 2048), (32, 2048)),
}
SLOW_COMBINE_BUDGETS = {
    (64, 2): ((32, 1024), (32, 1024), (32, 1024), (24, 1024)),
    (256, 40): ((40, 2048), (40, 2048), (40, 2048), (56, 4096)),
}
# by dtype, dtype of the blocks, E, and whether heads are normalised
ROTATION_BUDGETS = {
    ("bf16", "bf16", 64, False): ((64, 512), (64, 512), (64, 512), (56, 0)),
    ("bf16", "bf16", 128, False): ((64, 512), (64, 512), (64, 512), (56, 512)),
    ("bf16", "fp8", 128, False): ((64, 512), (64, 512), (88, 512), (56, 512)),
    ("fp32", "fp32", 128, False): ((64, 0), (64, 0), (64, 0), (64, 512)),
    ("bf16", "bf16", 128, True): ((96, 512), (88, 512), (96, 512), (64, 512)),
}


def blocks_of(dtype: torch.dtype, num_kv_heads: int, head_dim: int, num_bytes: int) -> Tensor:
    """KV blocks of at least that size, zeros that occupy no memory."""
    shape = (2, num_kv_heads, BLOCK_SIZE, head_dim)
    block_bytes = torch.Size(shape).numel() * dtype.itemsize
    return anonymous_zeros((num_bytes // block_bytes + 1, *shape), dtype)


def attention(
    case: tuple[str, str, int, int, int],
    *,
    num_splits: int = 1,
    num_tiles: int = 4,
    num_bytes: int = VAST_BYTES,
    num_sequences: int = 8,
    offset: int = 0,
) -> Callable[[], object]:
    """A step of decodes, or with tiles of short and long chunks; it launches split_context, combine
    if it splits, and prefill if it has tiles.

    Its int64 tensors start ``offset`` elements after an aligned address.
    """
    name, kv_name, head_dim, num_heads, num_kv_heads = case
    kv_blocks = blocks_of(DTYPES[kv_name], num_kv_heads, head_dim, num_bytes)
    # queries are a slice of wider rows
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.zeros(num_sequences, width, dtype=DTYPES[name])
    q = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
    zeros = torch.zeros(num_sequences + 2 * num_tiles + 2, dtype=torch.int64)[offset:]
    step = PagedStep(
        query_starts_S1=zeros[: num_sequences + 1],
        context_lengths_S=zeros[:num_sequences],
        seats_S=zeros[:num_sequences],
        block_table_PB=torch.zeros(8, 512, dtype=torch.int32),
        tiles_I2=zeros[: 2 * num_tiles].view(num_tiles, 2) if num_tiles else None,
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return lambda: paged_attention.paged_attention(
        q, kv_blocks, step, num_splits=num_splits, out_THE=out
    )


def rotation(case: tuple[str, str, int, bool], num_bytes: int = VAST_BYTES) -> Callable[[], object]:
    """The rotation of 32 query heads and 8 KV heads."""
    name, kv_name, head_dim, has_norm = case
    kv_blocks = blocks_of(DTYPES[kv_name], 8, head_dim, num_bytes)
    norm = (torch.ones(2, head_dim, dtype=DTYPES[name]), 1e-5) if has_norm else None
    qkv = torch.zeros(64, 48 * head_dim, dtype=DTYPES[name])
    angles = torch.zeros(9, 1, head_dim // 2), torch.zeros(9, 1, head_dim // 2)
    zeros = torch.zeros(64, dtype=torch.int64)
    return lambda: rotate_and_store(qkv, zeros, angles, zeros, kv_blocks, 32, norm)


def size_of(case: tuple[str, str, int, int, int]) -> tuple[int, int]:
    """The entry of the launch tables for a case."""
    return DTYPES[case[0]].itemsize, next(size for size in (64, 128, 256) if case[2] <= size)


def wide_kv_loads(
    launch: AttentionLaunch, case: tuple[str, str, int, int, int], target: str, loops: int
) -> int:
    """Number of 128-bit loads per lane of keys and values: once per stage of each loop.

    Values of fp8 are excluded: on NVIDIA, triton loads 64 bits to feed them to tensor cores.
    """
    loads_of = 1 if case[1] == "fp8" else 2
    tile_bytes = loads_of * launch.keys * size_of(case)[1] * DTYPES[case[1]].itemsize
    lanes = launch.num_warps * TARGETS[target].warp_size
    return loops * launch.num_stages * (tile_bytes // (16 * lanes))


def attention_check(case: tuple, target: str, budgets: tuple, num_bytes: int) -> None:
    size = size_of(case)
    (decode,) = all_compiled(TARGETS[target], attention(case, num_tiles=0, num_bytes=num_bytes))
    check(decode, budgets[0], wide_kv_loads(DECODE_LAUNCHES[size], case, target, loops=1))
    call = attention(case, num_splits=MIXED_SPLITS, num_bytes=num_bytes)
    chunk, combine, prefill = all_compiled(TARGETS[target], call)
    check(chunk, budgets[1], wide_kv_loads(CHUNK_LAUNCHES[size], case, target, loops=1))
    check(combine, CHUNK_COMBINE_BUDGETS[size[1]], wide_loads=2)
    # one loop without and one with a causal mask
    check(prefill, budgets[2], wide_kv_loads(PREFILL_LAUNCHES[size], case, target, loops=2))


def test_every_shipped_launch_is_compiled_here():
    sizes = {size_of(case) for case in ATTENTION_BUDGETS | SLOW_ATTENTION_BUDGETS}
    # see below for heads of 256 values in fp32
    for launches in DECODE_LAUNCHES, CHUNK_LAUNCHES, PREFILL_LAUNCHES:
        assert set(launches) == sizes | {(4, 256)}
    large = LARGE_PREFILL_LAUNCHES.items() - PREFILL_LAUNCHES.items()
    assert {size for size, _ in large} == {size_of(case) for case in LARGE_PREFILL_BUDGETS}


@pytest.mark.parametrize(("case", "target", "budgets"), per_target(ATTENTION_BUDGETS))
def test_attention(case, target, budgets):
    attention_check(case, target, budgets, VAST_BYTES)


@pytest.mark.parametrize(("case", "target", "budgets"), per_target(SLOW_ATTENTION_BUDGETS))
def test_attention_of_other_sizes(case, target, budgets):
    attention_check(case, target, budgets, VAST_BYTES)


def one_of_each_launch() -> list[tuple]:
    """A case of each launch, with KV blocks of each number of bytes per value."""
    cases = reversed(ATTENTION_BUDGETS | SLOW_ATTENTION_BUDGETS)
    return list({(size_of(case), DTYPES[case[1]].itemsize): case for case in cases}.values())


@pytest.mark.parametrize("case", one_of_each_launch())
def test_few_blocks_that_amd_reads_with_32_bit_offsets(case):
    attention_check(case, "gfx942", ((512, 65536),) * 3, num_bytes=2**20)
    rotated = compiled(TARGETS["gfx942"], rotation((*case[:3], False), num_bytes=2**20))
    assert not rotated.spills and not rotated.narrow_loads


@pytest.mark.parametrize("number", range(2), ids=["sm_90", "sm_100"])
@pytest.mark.parametrize("case", LARGE_PREFILL_BUDGETS)
def test_prefill_with_much_shared_memory(case, number, monkeypatch):
    monkeypatch.setattr(paged_attention, "has_large_shared_memory", lambda device: True)
    target = ("sm_90", "sm_100")[number]
    # splits, so that the other kernels are those that test_attention compiled
    *_, prefill = all_compiled(TARGETS[target], attention(case, num_splits=MIXED_SPLITS))
    wide_loads = wide_kv_loads(LARGE_PREFILL_LAUNCHES[size_of(case)], case, target, loops=2)
    check(prefill, LARGE_PREFILL_BUDGETS[case][number], wide_loads)


@pytest.mark.parametrize("target", TARGETS)
def test_heads_of_256_values_in_fp32(target):
    case = ("fp32", "fp32", 256, 8, 1)
    (decode,) = all_compiled(TARGETS[target], attention(case, num_tiles=0))
    check(decode, (232, 50688), wide_loads=16)
    # the others are for tests of results, and may spill a little
    chunk, _, prefill = all_compiled(TARGETS[target], attention(case, num_splits=MIXED_SPLITS))
    assert chunk.spills <= (200 if target == "gfx942" else 0)
    check(replace(chunk, spills=0), (128, 98304), wide_loads=2)
    spills = 100 if target == "sm_80" else 0
    assert prefill.spills <= spills
    check(replace(prefill, spills=0), (208, 68096), wide_loads=16)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(COMBINE_BUDGETS))
def test_combine(case, target, budget):
    head_dim, num_splits = case
    call = attention(("bf16", "bf16", head_dim, 32, 8), num_splits=num_splits, num_tiles=0)
    _, combine = all_compiled(TARGETS[target], call)
    # two loads of 64 bits on AMD
    check(combine, budget, wide_loads=2)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(SLOW_COMBINE_BUDGETS))
def test_combine_of_other_sizes(case, target, budget):
    head_dim, num_splits = case
    call = attention(("bf16", "bf16", head_dim, 9, 3), num_splits=num_splits, num_tiles=0)
    check(all_compiled(TARGETS[target], call)[1], budget, wide_loads=1)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(ROTATION_BUDGETS))
def test_rotate_and_store(case, target, budget):
    # both halves of the heads
    check(compiled(TARGETS[target], rotation(case)), budget, wide_loads=2)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_the_check_rejects_heads_that_are_not_aligned(target):
    # rows of 168 bytes
    chunk, prefill = all_compiled(TARGETS[target], attention(("bf16", "bf16", 84, 32, 8)))
    for figures in chunk, prefill:
        with pytest.raises(AssertionError, match="loads are narrow"):
            check(figures, (512, 2**17), wide_loads=8)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_the_check_rejects_tiles_of_more_keys_than_registers(target, monkeypatch):
    large = AttentionLaunch(keys=128, num_warps=4, num_stages=2, most_heads=4)
    monkeypatch.setitem(PREFILL_LAUNCHES, (2, 128), large)
    call = attention(("bf16", "bf16", 128, 32, 8))
    with pytest.raises(AssertionError, match="spills"):
        check(all_compiled(TARGETS[target], call)[1], (512, 2**20), wide_loads=0)


def test_steps_of_any_size_and_alignment_run_the_same_kernels():
    case = ("bf16", "bf16", 64, 9, 3)
    kernels = (
        attention_kernels.split_context,
        attention_kernels.combine,
        attention_kernels.prefill,
    )

    def num_variants() -> int:
        return sum(len(cache[0]) for one in kernels for cache in one.device_caches.values())

    all_compiled(TARGETS["sm_90"], attention(case, num_splits=2))
    warm = num_variants()
    # torch gives a single row another stride, so a step of one token has its own variants
    for num_sequences, num_tiles, offset in (2, 16, 1), (15, 3, 1), (16, 1, 0):
        sizes = {"num_sequences": num_sequences, "num_tiles": num_tiles, "offset": offset}
        all_compiled(TARGETS["sm_90"], attention(case, num_splits=2, **sizes))
    assert num_variants() == warm > 0
    all_compiled(TARGETS["sm_90"], attention(case, num_splits=3))
    assert num_variants() > warm
