"""Budgets of the product kernels: registers, shared memory, spills, wide loads."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import triton

from engine.executors.cuda.kernels import product_tiles
from engine.executors.cuda.kernels.embed import embed
from engine.executors.cuda.kernels.linear_operands import LinearOperands
from engine.executors.cuda.kernels.mixture import mixture
from engine.executors.cuda.kernels.narrow_product import narrow_linear
from engine.executors.cuda.kernels.product_tiles import (
    PRODUCT_LAUNCHES,
    ProductLaunch,
    block_m_for,
    launch_for,
)
from engine.executors.cuda.kernels.rms_norm import rms_norm
from engine.executors.cuda.kernels.routing import route
from engine.executors.cuda.kernels.silu_gate import silu_gate
from engine.executors.cuda.kernels.widen_groups import widen_groups
from engine.model.grouped_weights import GroupFormat, WeightGroups
from memory_ops.anonymous import anonymous_zeros
from tests.engine.executors.cuda.group_cases import FORMATS
from tests.kernel_tools.machine_code import (
    TARGETS,
    Figures,
    all_compiled,
    check,
    compiled,
    per_target,
)

BF16, EPS = torch.bfloat16, 1e-5
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": BF16}
# loads of one norm weight or residual value per lane; all other loads are wide
NARROW_LOADS = 4
# by dtype, rows, K, N and kind of product: upper limits (registers per lane, shared bytes per
# program) for each of TARGETS, with the compiler that constraints.txt names. Kinds: "normed" (and
# bias), "gated" (and norm), "added" (to a residual).
BUDGETS = {
    # SmolLM2-135M
    ("bf16", 16, 576, 960, "normed"): ((168, 50176), (168, 50176), (168, 50176), (200, 32768)),
    ("bf16", 16, 576, 576, "added"): ((40, 49152), (40, 49152), (40, 49152), (56, 49152)),
    ("bf16", 16, 576, 3072, "gated"): ((136, 49664), (128, 49664), (128, 49664), (160, 36864)),
    ("bf16", 16, 1536, 576, "added"): ((48, 49152), (40, 49152), (40, 49152), (120, 49152)),
    ("bf16", 16, 576, 49152, "normed"): ((120, 57344), (104, 57344), (104, 57344), (80, 51200)),
    # Llama-3-8B
    ("bf16", 16, 4096, 6144, "normed"): ((128, 49664), (96, 49664), (96, 49664), (128, 36864)),
    ("bf16", 16, 4096, 4096, "added"): ((40, 49152), (40, 49152), (40, 49152), (88, 49152)),
    ("bf16", 16, 4096, 28672, "gated"): ((80, 57344), (80, 57344), (88, 57344), (80, 51200)),
    ("bf16", 16, 14336, 4096, "added"): ((40, 49152), (40, 49152), (40, 49152), (88, 49152)),
    ("bf16", 16, 4096, 128256, "normed"): ((120, 57344), (104, 57344), (104, 57344), (80, 51200)),
}
SLOW_BUDGETS = {
    ("bf16", 32, 576, 960, "normed"): ((128, 37376), (96, 37376), (104, 37376), (128, 20480)),
    ("bf16", 32, 576, 3072, "gated"): ((168, 66048), (128, 66048), (136, 66048), (160, 40960)),
    ("bf16", 32, 4096, 6144, "normed"): ((128, 66048), (128, 66048), (136, 66048), (192, 40960)),
    ("bf16", 32, 4096, 28672, "gated"): ((128, 65536), (128, 65536), (112, 65536), (224, 53248)),
    ("bf16", 32, 4096, 128256, "normed"): ((128, 65536), (136, 65536), (128, 65536), (128, 53248)),
    ("bf16", 32, 14336, 4096, "added"): ((48, 65536), (48, 65536), (48, 65536), (120, 65536)),
    ("bf16", 64, 576, 960, "normed"): ((80, 38912), (80, 40960), (72, 32784), (112, 14336)),
    ("bf16", 64, 576, 3072, "gated"): ((104, 57344), (88, 61440), (72, 53280), (136, 24576)),
    ("bf16", 64, 4096, 6144, "normed"): ((96, 57344), (80, 61440), (72, 53264), (152, 24576)),
    ("bf16", 64, 4096, 28672, "gated"): ((232, 57344), (144, 73728), (80, 65568), (176, 40960)),
    ("bf16", 64, 4096, 128256, "normed"): ((176, 57344), (144, 73728), (128, 65552), (176, 40960)),
    ("bf16", 64, 14336, 4096, "added"): ((48, 49152), (48, 61440), (40, 61456), (88, 49152)),
    ("fp32", 16, 576, 960, "normed"): ((64, 57344), (64, 57344), (72, 57344), (120, 32768)),
    ("fp32", 16, 576, 3072, "gated"): ((64, 53248), (64, 53248), (64, 53248), (104, 36864)),
    ("fp32", 64, 4096, 6144, "normed"): ((96, 57344), (96, 57344), (96, 57344), (152, 24576)),
    ("fp16", 16, 576, 960, "normed"): ((168, 50176), (168, 50176), (168, 50176), (152, 32768)),
    ("fp16", 16, 576, 3072, "gated"): ((136, 49664), (128, 49664), (128, 49664), (184, 36864)),
    ("fp16", 64, 4096, 6144, "normed"): ((104, 57344), (80, 61440), (72, 53264), (128, 24576)),
}
# by tokens, D and I of 8 experts, 2 per token: the larger figures of both products
MIXTURE_BUDGETS = {
    (16, 4096, 14336): ((64, 55296), (64, 55296), (72, 55296), (104, 55296)),
}
SLOW_MIXTURE_BUDGETS = {
    (256, 4096, 14336): ((128, 49152), (128, 73728), (80, 73760), (104, 49152)),
}
OTHER_GROUPED_PRODUCTS = [
    ("bf16", 64, 4096, 128256, "normed"),
    ("bf16", 32, 14336, 4096, "added"),
    ("fp16", 64, 4096, 6144, "normed"),
    ("fp32", 16, 576, 3072, "gated"),
    ("fp32", 64, 4096, 6144, "normed"),
]
MOST_SPILLS_OF_GROUPS = 24
# the largest figures of products with weights in groups
GROUPS_ON_NVIDIA, GROUPS_ON_AMD = (192, 53280), (304, 49168)
# all targets: choice of experts, sort of pairs, sum of each token's pairs
CHOICE_BUDGET, SORT_BUDGET, SUM_BUDGET = (24, 0), (64, 8192), (32, 0)
# by width: the largest figures of norm, gate and embedding
SMALL_BUDGETS = {(4096,): ((56, 16), (56, 16), (56, 16), (48, 16))}
SLOW_SMALL_BUDGETS = {(576,): ((32, 16), (32, 16), (32, 16), (40, 16))}


def product_of(
    dtype: str, rows: int, width: int, columns: int, kind: str
) -> Callable[[], torch.Tensor]:
    """A call of the product."""
    x = torch.zeros(rows, width, dtype=DTYPES[dtype])
    weight = anonymous_zeros((columns, width), x.dtype)
    norm = torch.zeros(width, dtype=x.dtype), EPS
    options = {
        "normed": {"norm": norm, "bias_N": torch.zeros(columns, dtype=x.dtype)},
        "gated": {"norm": norm, "is_gated": True},
        "added": {"residual_MO": torch.zeros(rows, columns, dtype=x.dtype)},
    }
    return lambda: narrow_linear(LinearOperands(x, weight, **options[kind]))


def grouped_product_of(
    one: GroupFormat, dtype: str, rows: int, width: int, columns: int, kind: str
) -> Callable[[], torch.Tensor]:
    """A call of the product with weights in groups."""
    x = torch.zeros(rows, width, dtype=DTYPES[dtype])
    norm = torch.zeros(width, dtype=x.dtype), EPS
    options = {
        "normed": {"norm": norm, "bias_N": torch.zeros(columns, dtype=x.dtype)},
        "gated": {"norm": norm, "is_gated": True},
        "added": {"residual_MO": torch.zeros(rows, columns, dtype=x.dtype)},
    }
    weight = grouped(one, (columns, width))
    return lambda: narrow_linear(LinearOperands(x, weight, **options[kind]))


def grouped(one: GroupFormat, shape: tuple[int, ...]) -> WeightGroups:
    """Weights of this shape, all dimensions but the last as they are in the arrays."""
    arrays = [
        anonymous_zeros((*shape[:-1], columns), dtype)
        for (_, columns), dtype in one.arrays(1, shape[-1]).values()
    ]
    values, scales, *minimums = arrays
    return WeightGroups(values, scales, one.bits, *minimums)


def weight_loads(launch: ProductLaunch, dtype: str, target: str, *, is_gated: bool) -> int:
    """Number of 128-bit loads per lane that one step of a program needs for the weight."""
    rows, lanes = launch.block_n * (1 + is_gated), launch.num_warps * TARGETS[target].warp_size
    return rows * launch.block_k * DTYPES[dtype].itemsize // (16 * lanes)


def product_check(case: tuple, target: str, budget: tuple[int, int]) -> None:
    dtype, rows, width, columns, kind = case
    is_gated = kind == "gated"
    outputs, x = columns // (1 + is_gated), torch.zeros(rows, width, dtype=DTYPES[dtype])
    launch = launch_for(x, outputs, block_m_for(rows), is_gated=is_gated)
    figures = compiled(TARGETS[target], product_of(*case))
    check_wide(figures, budget, weight_loads(launch, dtype, target, is_gated=is_gated))


def check_wide(figures: Figures, budget: tuple[int, int], wide_loads: int) -> None:
    """Like ``check``, with the narrow loads that are allowed."""
    assert figures.narrow_loads <= NARROW_LOADS, f"loads are narrow: {figures}"
    check(replace(figures, narrow_loads=0), budget, wide_loads)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(BUDGETS))
def test_products(case, target, budget):
    product_check(case, target, budget)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(SLOW_BUDGETS))
def test_products_of_more_rows_and_dtypes(case, target, budget):
    product_check(case, target, budget)


def groups_check(figures: Figures, target: str) -> None:
    """At most a few spills, and limits of registers and shared memory."""
    budget = GROUPS_ON_AMD if target.startswith("gfx") else GROUPS_ON_NVIDIA
    assert figures.spills <= MOST_SPILLS_OF_GROUPS
    # scales are two bytes per group, and on AMD four bits of few columns take narrow loads
    check(
        replace(figures, narrow_loads=0, spills=0), budget, wide_loads=not target.startswith("gfx")
    )


# the product with the most registers, of few and of many rows
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("one", FORMATS, ids=str)
def test_products_with_weights_in_groups(one, rows, target):
    case = ("bf16", rows, 4096, 28672, "gated")
    groups_check(compiled(TARGETS[target], grouped_product_of(one, *case)), target)


def paired(cases: Sequence) -> list:
    """Each case with each target, and each of both with each format, as parameters."""
    return [
        pytest.param(FORMATS[(row + column) % len(FORMATS)], case, target, id=f"{case}-{target}")
        for row, case in enumerate(cases)
        for column, target in enumerate(TARGETS)
    ]


@pytest.mark.parametrize(("one", "case", "target"), paired(OTHER_GROUPED_PRODUCTS))
def test_other_products_with_weights_in_groups(one, case, target):
    figures = compiled(TARGETS[target], grouped_product_of(one, *case))
    if case[0] == "fp32":
        assert not figures.spills
    else:
        groups_check(figures, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("one", FORMATS, ids=str)
def test_split_sums_embeddings_and_dense_copies_of_groups(one, target):
    parts, whole = all_compiled(
        TARGETS[target], grouped_product_of(one, "bf16", 1, 4096, 2, "normed")
    )
    groups_check(parts, target)
    assert not whole.spills
    embedding, ids = grouped(one, (49152, 4096)), torch.zeros(16, dtype=torch.int64)
    out = torch.zeros(16, 4096, dtype=BF16)
    for call in (
        lambda: embed(ids, ids, embedding, out),
        lambda: widen_groups(embedding, 4096, BF16),
    ):
        figures = compiled(TARGETS[target], call)
        assert not figures.spills and figures.registers <= 128


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("one", FORMATS, ids=str)
def test_experts_in_groups(one, target):
    experts_check(one, 16, target)


@pytest.mark.parametrize(("one", "num_tokens", "target"), paired([256]))
def test_experts_in_groups_of_more_tokens(one, num_tokens, target):
    experts_check(one, num_tokens, target)


def experts_check(one: GroupFormat, num_tokens: int, target: str) -> None:
    x, logits = torch.zeros(num_tokens, 4096, dtype=BF16), torch.zeros(num_tokens, 8, dtype=BF16)
    weights = grouped(one, (8, 28672, 4096)), grouped(one, (8, 4096, 14336))
    _, _, *both, _ = all_compiled(
        TARGETS[target], lambda: mixture(torch.zeros_like(x), x, logits, *weights, 2)
    )
    for figures in both:
        groups_check(figures, target)


def mixture_check(case: tuple, target: str, budget: tuple[int, int]) -> None:
    num_tokens, width, inner = case
    x, logits = torch.zeros(num_tokens, width, dtype=BF16), torch.zeros(num_tokens, 8, dtype=BF16)
    residual = torch.zeros_like(x)
    gate_up = anonymous_zeros((8, 2 * inner, width), BF16)
    down = anonymous_zeros((8, width, inner), BF16)
    choice, sort, *both, total = all_compiled(
        TARGETS[target], lambda: mixture(residual, x, logits, gate_up, down, 2)
    )
    check(choice, CHOICE_BUDGET, wide_loads=0)
    check(sort, SORT_BUDGET, wide_loads=0)
    check(total, SUM_BUDGET, wide_loads=2)
    hidden = torch.zeros(2 * num_tokens, inner, dtype=BF16)
    for figures, rows, outputs in zip(both, (x, hidden), (inner, width), strict=True):
        is_gated = rows is x
        block_m = block_m_for(num_tokens * 2 // 8)
        launch = launch_for(rows, outputs, block_m, is_gated=is_gated)
        check_wide(figures, budget, weight_loads(launch, "bf16", target, is_gated=is_gated))


@pytest.mark.parametrize(("case", "target", "budget"), per_target(MIXTURE_BUDGETS))
def test_mixture(case, target, budget):
    mixture_check(case, target, budget)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(SLOW_MIXTURE_BUDGETS))
def test_mixture_of_more_tokens(case, target, budget):
    mixture_check(case, target, budget)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 6), (256, 8)])
def test_routing_to_many_experts(num_experts, top_k, target):
    logits = torch.zeros(32, num_experts, dtype=BF16)
    both = all_compiled(TARGETS[target], lambda: route(logits, top_k))
    assert len(both) == 2
    for figures in both:
        check_wide(figures, (72, 8192), wide_loads=0)


def small_check(width: int, target: str, budget: tuple[int, int]) -> None:
    x, wide = torch.zeros(16, 2 * width, dtype=BF16), torch.zeros(16, width)
    halves = x.view(16, 2, 2, width // 2)
    weight, ids = torch.zeros(width, dtype=BF16), torch.zeros(16, dtype=torch.int64)
    embedding = anonymous_zeros((49152, width), BF16)
    calls = [
        lambda: rms_norm(x[:, :width], weight, EPS),
        lambda: rms_norm(halves, weight.view(2, -1), EPS),
        lambda: silu_gate(x[:, :width], x[:, width:]),
        lambda: silu_gate(x[:, :width], wide),
        lambda: embed(ids, ids, embedding),
    ]
    for call in calls:
        check(compiled(TARGETS[target], call), budget, wide_loads=width >= 1024)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(SMALL_BUDGETS))
def test_norm_gate_and_embedding(case, target, budget):
    small_check(*case, target, budget)


@pytest.mark.parametrize(("case", "target", "budget"), per_target(SLOW_SMALL_BUDGETS))
def test_norm_gate_and_embedding_of_narrow_models(case, target, budget):
    small_check(*case, target, budget)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("kind", ["normed", "gated"])
def test_a_split_sum_compiles(kind, target):
    parts, whole = all_compiled(TARGETS[target], product_of("bf16", 1, 4096, 2, kind))
    assert not parts.spills and not whole.spills
    assert parts.wide_loads and parts.narrow_loads <= NARROW_LOADS


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1001, 17)])
def test_one_value_and_ragged_shapes_compile(shape, dtype, target):
    # triton turns a size of 1 into a constant, which takes another code path
    assert compiled(TARGETS[target], product_of(dtype, *shape, "normed")).registers


def test_rows_of_one_block_share_a_kernel(monkeypatch):
    misses = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda **miss: misses.append(miss["key"])
    )
    for rows in (1, 2, 3, 16):
        all_compiled(TARGETS["sm_90"], product_of("bf16", rows, 576, 48, "added"))
    assert len(misses) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_the_check_rejects_weights_that_are_not_aligned(target):
    x = torch.zeros(16, 576, dtype=BF16)
    weight = torch.zeros(960, 577, dtype=BF16)[:, 1:]
    figures = compiled(TARGETS[target], lambda: narrow_linear(LinearOperands(x, weight)))
    with pytest.raises(AssertionError, match="loads are narrow"):
        check_wide(figures, (255, 2**16), wide_loads=0)


@pytest.mark.parametrize("target", TARGETS)
def test_the_check_rejects_tiles_that_exceed_the_registers(target, monkeypatch):
    # AMD has more registers than the budget, so that they do not spill
    launch = ProductLaunch(block_n=256, block_k=128, num_warps=1, num_stages=2)
    monkeypatch.setitem(PRODUCT_LAUNCHES, False, ((0, launch),))
    figures = compiled(TARGETS[target], product_of("bf16", 16, 4096, 2**15, "added"))
    with pytest.raises(AssertionError, match="spills|registers"):
        check_wide(figures, (255, 2**16), wide_loads=0)


@pytest.mark.parametrize("target", TARGETS)
def test_the_check_rejects_tiles_that_exceed_the_shared_memory(target, monkeypatch):
    monkeypatch.setattr(product_tiles, "_MOST_BYTES", 2**20)
    launch = ProductLaunch(block_n=16, block_k=256, num_stages=9)
    monkeypatch.setitem(PRODUCT_LAUNCHES, False, ((0, launch),))
    figures = compiled(TARGETS[target], product_of("bf16", 16, 4096, 960, "added"))
    with pytest.raises(AssertionError, match="shared memory"):
        check_wide(figures, (512, 2**16), wide_loads=0)
