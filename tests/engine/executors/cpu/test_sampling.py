"""Sampled tokens in every native build and in torch, against the definition in fp64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.sampling.choice import choose
from tests.engine.sampling.definition import (
    EVERY_KIND,
    check,
    choices,
    invalid_rows,
    kept_weights,
    logits,
)

SAMPLERS = {build: CpuKernels(build).sample for build in CPU_LIBRARY.runnable_builds}
SAMPLERS["torch"] = choose
each_sampler = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@each_sampler
@each_dtype
@given(
    logits_V=logits(),
    temperature=st.sampled_from([1e-300, 0.01, 0.5, 1.0, 3.0, 100.0]),
    top_k=st.sampled_from([-1, 0, 1, 2, 7, 50, 400, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-9]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_a_token_is_drawn_within_its_interval_of_the_distribution(
    sample, dtype, logits_V, temperature, top_k, top_p, min_p
):
    check(sample, logits_V.to(dtype), choices(1, temperature, top_k, top_p, min_p)[0])


@each_sampler
@each_dtype
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (50, 1.0), (2000, 1.0), (0, 0.9), (50, 0.9)]
)
def test_a_large_vocabulary(sample, dtype, scale, top_k, top_p):
    logits_V = (torch.randn(49_155) * scale).to(dtype)
    check(sample, logits_V, choices(1, 0.8, top_k, top_p)[0], most_draws=100)


@each_sampler
@pytest.mark.parametrize("kind", [{"top_k": 5}, {"min_p": 1.0}])
def test_nearly_equal_logits_differ_only_by_rounding(sample, kind):
    logits_V = torch.randn(1000) * 1e-5
    rows = choices(2000, uniform=np.arange(2000) / 2000, **kind)
    drawn = sample(logits_V.expand(2000, -1), rows)
    floor = logits_V.topk(kind.get("top_k", 1)).values[-1]
    assert (logits_V[drawn] >= floor - 1.2e-6).all()
    assert set((logits_V >= floor).nonzero().flatten().tolist()) <= set(drawn.tolist())


@each_sampler
@each_dtype
def test_draws_have_the_right_frequencies(sample, dtype):
    logits_V, count = (torch.randn(300) * 2).to(dtype), 20_000
    for kind in ({}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}):
        rows = choices(
            count, temperature=0.7, uniform=np.random.default_rng(2).random(count), **kind
        )
        weights_V = kept_weights(logits_V.double().numpy(), rows[0])
        drawn = np.bincount(sample(logits_V.expand(count, -1), rows).numpy(), minlength=300)
        assert not drawn[weights_V == 0].any()
        # all rare tokens as one class
        expected_V = weights_V / weights_V.sum() * count
        order = np.argsort(expected_V)
        rare = order[expected_V[order].cumsum() < 20]
        common = np.setdiff1d(order[expected_V[order] > 0], rare)
        found = [*drawn[common], drawn[rare].sum()]
        wanted = [*expected_V[common], expected_V[rare].sum()]
        statistic = sum((f - w) ** 2 / w for f, w in zip(found, wanted, strict=True) if w)
        assert statistic <= stats.chi2.ppf(0.999, len(common))


@each_sampler
@each_dtype
@pytest.mark.parametrize("size", [1, 8, 512])
def test_a_number_on_the_border_of_two_tokens_gives_the_second(sample, dtype, size):
    uniforms = np.arange(size) / size
    for kind in ({}, {"top_p": 0.5}, {"top_k": 1}, {"min_p": 1.0}):
        rows = choices(size, temperature=0.3, uniform=uniforms, **kind)
        drawn = sample(torch.full((size, size), 7.0, dtype=dtype), rows)
        assert drawn.tolist() == list(range(size))


@each_sampler
@each_dtype
@given(logits_V=logits())
def test_greedy_takes_the_first_of_the_largest(sample, dtype, logits_V):
    logits_V = logits_V.to(dtype)
    (chosen,) = sample(logits_V[None], choices(temperature=0)).tolist()
    assert chosen == int(np.argmax(logits_V.float().numpy()))


@each_sampler
@each_dtype
def test_zeros_of_both_signs_are_equal(sample, dtype):
    logits_V = torch.full((700,), -1.0, dtype=dtype)
    logits_V[[300, 400, 650]] = torch.tensor([-0.0, 0.0, -0.0], dtype=dtype)
    assert sample(logits_V[None], choices(temperature=0)).tolist() == [300]


@each_sampler
@each_dtype
@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("size", [5, 256, 300, 5000])
def test_nan_and_infinity_give_no_token_and_do_not_affect_other_rows(sample, dtype, kind, size):
    good_LV, bad_LV = torch.randn(5, size).to(dtype), invalid_rows(size, dtype)
    mixed_LV = torch.stack((good_LV, bad_LV), dim=1).flatten(0, 1)
    chosen = sample(mixed_LV, choices(10, **kind))
    assert chosen[1::2].tolist() == [-1] * 5
    assert torch.equal(chosen[::2], sample(good_LV, choices(5, **kind)))


@each_sampler
@each_dtype
def test_a_row_does_not_depend_on_its_batch_or_the_number_of_threads(sample, dtype):
    rows = np.concatenate([choices(8, **kind) for kind in EVERY_KIND])
    rows["uniform"] = np.random.default_rng(3).random(len(rows))
    logits_LV = torch.randn(len(rows), 3000).to(dtype)
    together = sample(logits_LV, rows)
    alone = [sample(logits_LV[i : i + 1], rows[i : i + 1]) for i in range(len(rows))]
    assert torch.equal(together, torch.cat(alone))
    order = torch.randperm(len(rows))
    assert torch.equal(sample(logits_LV[order], rows[order.numpy()]), together[order])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(sample(logits_LV, rows), together)
    finally:
        torch.set_num_threads(threads)


@each_sampler
@each_dtype
def test_strided_logits_are_read_and_stay_unchanged(sample, dtype):
    wide_LV = torch.randn(6, 900).to(dtype)
    before, rows = wide_LV.clone(), choices(6, top_p=0.9)
    wanted = sample(wide_LV[:, 100:700].contiguous(), rows)
    assert torch.equal(sample(wide_LV[:, 100:700], rows), wanted)
    turned_LV = wide_LV[:, 100:700].t().contiguous().t()
    assert torch.equal(sample(turned_LV, rows), wanted)
    assert torch.equal(wide_LV, before)


def test_torch_samples_from_other_dtypes_too():
    logits_LV, rows = torch.randn(4, 400), choices(4, top_k=7)
    assert torch.equal(choose(logits_LV.double(), rows), choose(logits_LV, rows))
