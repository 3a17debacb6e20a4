"""Product-key top-K in every native build: rows and order equal the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_ops import reference
from memory_ops.native.backend import NativeBackend
from tests.memory_ops.builds import each_build

SUBKEYS = st.one_of(st.integers(2, 70), st.sampled_from([127, 256, 1000, 1024, 2500]))
INF = torch.inf


def random(shape, generator):
    return torch.randn(shape, generator=generator)


def tied(shape, generator):
    return torch.randint(-2, 3, shape, generator=generator).float()


def few_finite(shape, generator):
    scores = random(shape, generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.8, -INF, scores)


def few_distinct(shape, generator):
    # with both zeros and subnormal numbers
    values = torch.tensor([3e38, 1.0, 1e-42, 0.0, -0.0, -1e-42, -1.0, -INF])
    return values[torch.randint(0, len(values), shape, generator=generator)]


def constant(shape, generator):
    return torch.full(shape, 0.25)


def ascending(shape, generator):
    # the best scores come last in every vector lane
    return torch.arange(shape[-1]).float().expand(shape)


def check(build: str, scores: torch.Tensor, top_k: int) -> None:
    """Assert rows and order equal to the reference, and weights within fp32 tolerance."""
    rows, weights = NativeBackend(build).product_topk(scores, top_k)
    wanted, _ = reference.product_topk(scores, top_k)
    assert torch.equal(rows, wanted)
    num_subkeys = scores.shape[3]
    halves = torch.stack((rows // num_subkeys, rows % num_subkeys), dim=2)
    # sums are fp32, as in the kernel; only the softmax is in higher precision
    sums = scores.gather(3, halves).sum(dim=2).double()
    sums = sums.masked_fill(sums.isneginf().all(-1, keepdim=True), 0.0)
    torch.testing.assert_close(weights, sums.softmax(-1).float(), equal_nan=True)


@each_build
@given(
    kind=st.sampled_from([random, tied, few_finite, few_distinct, constant, ascending]),
    num_tokens=st.integers(0, 3),
    num_heads=st.sampled_from([1, 3, 4]),
    num_subkeys=SUBKEYS,
    part=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_rows_and_weights_equal_the_reference(
    build, kind, num_tokens, num_heads, num_subkeys, part, seed
):
    top_k = 1 + round(part * (min(num_subkeys, 128) - 1))
    generator = torch.Generator().manual_seed(seed)
    check(build, kind((num_tokens, num_heads, 2, num_subkeys), generator), top_k)


@each_build
@pytest.mark.parametrize("kind", [random, tied, few_finite, constant])
@pytest.mark.parametrize(
    ("num_subkeys", "top_k"), [(65536, 1), (65536, 32), (65536, 128), (46341, 31), (128, 128)]
)
def test_large_top_k_and_top_k_of_all_subkeys(build, kind, num_subkeys, top_k):
    check(build, kind((2, 2, 2, num_subkeys), torch.Generator().manual_seed(1)), top_k)


@each_build
def test_many_tokens_over_several_threads(build):
    check(build, torch.randn(500, 4, 2, 37), 7)


@each_build
def test_strided_scores(build):
    wide = torch.randn(5, 3, 2, 80)
    check(build, wide[..., ::2], 9)
    check(build, wide.transpose(0, 1), 9)


@each_build
@given(
    num_subkeys=st.integers(2, 70),
    top_k=st.integers(1, 70),
    share=st.sampled_from([0.02, 0.5, 1]),
    wrong=st.sampled_from([torch.nan, -torch.nan, INF]),
)
def test_nan_never_gives_a_row_out_of_range(build, num_subkeys, top_k, share, wrong):
    top_k = min(top_k, num_subkeys)
    scores = torch.randn(4, 3, 2, num_subkeys)
    scores[torch.rand_like(scores) < share] = wrong
    rows, weights = NativeBackend(build).product_topk(scores, top_k)
    assert rows.min() >= 0 and rows.max() < num_subkeys**2
    assert all(len(set(head)) == top_k for token in rows.tolist() for head in token)
    # NaN stays visible: heads with NaN have NaN weights
    has_wrong = (scores != scores.clamp(max=1e38)).flatten(2).any(-1)
    assert torch.equal(weights.isnan().any(-1), has_wrong)
