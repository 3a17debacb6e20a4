"""Sampled tokens in every native build and in torch, against the definition in fp64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.sampling.choice import CHOICE, choose

SAMPLERS = {build: CpuKernels(build).sample for build in CPU_LIBRARY.runnable_builds}
SAMPLERS["torch"] = choose
each_sampler = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])

# largest distance of the uniform number from the interval of its token
CDF_TOLERANCE = 1e-6
# relative distance within which weights, or their sums, may fall on either side of a threshold
FLOOR_TOLERANCE = 1e-5
MOST_DRAWS = 1200


def choices(count=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.5):
    made = np.empty(count, dtype=CHOICE)
    for name, values in zip(CHOICE.names, (temperature, top_k, top_p, min_p, uniform), strict=True):
        made[name] = values
    return made


def kept_weights(logits_V, choice, top_k_nudge=0.0, top_p_nudge=0.0, min_p_nudge=0.0):
    """Kept weights by definition (sorting in fp64); the nudges shift the thresholds."""
    weights_V = np.exp((logits_V - logits_V.max()) / max(choice["temperature"], 1e-30))
    if 0 < choice["top_k"] < len(weights_V):
        floor = np.sort(weights_V)[-choice["top_k"]] * (1 - top_k_nudge)
        weights_V = np.where(weights_V >= floor, weights_V, 0)
    if choice["top_p"] < 1:
        falling = -np.sort(-weights_V)
        sums = falling.cumsum()
        wanted = choice["top_p"] * sums[-1] * (1 + top_p_nudge)
        floor = falling[min((sums < wanted).sum(), len(sums) - 1)]
        weights_V = np.where(weights_V >= floor, weights_V, 0)
    return np.where(weights_V >= choice["min_p"] * (1 - min_p_nudge), weights_V, 0)


def check(sample, logits_V, choice, most_draws=MOST_DRAWS):
    """Check draws at both ends, in the middle of each token's interval, and at random."""
    exact_V, nudge = logits_V.double().numpy(), FLOOR_TOLERANCE
    nudges = itertools.product((0, nudge), (0, -nudge, nudge), (0, nudge))
    definitions = [kept_weights(exact_V, choice, *three) for three in nudges]
    shares_V = definitions[0] / definitions[0].sum()
    middles = (shares_V.cumsum() - shares_V / 2)[shares_V > 0]
    middles = middles[:: -(-len(middles) // most_draws)]
    uniforms = np.concatenate(([0, 1 - 2**-53], middles, np.random.default_rng(1).random(50)))
    rows = np.repeat(choice, len(uniforms))
    rows["uniform"] = uniforms
    drawn = sample(logits_V.expand(len(rows), -1), rows).numpy()

    def fits(weights_V):
        ends_V = weights_V.cumsum() / weights_V.sum()
        starts_V = np.concatenate(([0], ends_V[:-1]))
        is_inside = (starts_V[drawn] - CDF_TOLERANCE <= uniforms) & (
            uniforms <= ends_V[drawn] + CDF_TOLERANCE
        )
        return ((weights_V[drawn] > 0) & is_inside).all()

    assert any(fits(weights_V) for weights_V in definitions)


@st.composite
def logits(draw):
    """Rows of many sizes and spreads, with and without ties and banned tokens."""
    size = draw(st.one_of(st.integers(1, 40), st.integers(200, 1100), st.just(512)))
    made_V = torch.randn(size, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    made_V = made_V * draw(st.sampled_from([0.0, 1.0, 4.0, 30.0]))
    if draw(st.booleans()):
        made_V = made_V.round()
    made_V += draw(st.sampled_from([0.0, -100.0, 1e4]))
    banned = draw(st.lists(st.integers(0, size - 1), max_size=size - 1, unique=True))
    return made_V.index_fill_(0, torch.tensor(banned, dtype=torch.int64), -torch.inf)


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


EVERY_KIND = [
    {"temperature": 0},
    {"temperature": 1e-300},
    {},
    {"top_k": 3},
    {"top_k": 290},
    {"top_p": 0.5},
    {"min_p": 0.1},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.2},
]


def invalid_rows(size, dtype):
    """Rows with NaN of either sign, infinity, or nothing finite at all."""
    negative_nan = torch.tensor([-0x400000], dtype=torch.int32).view(torch.float32)
    if dtype == torch.bfloat16:
        negative_nan = torch.tensor([-0x40], dtype=torch.int16).view(torch.bfloat16)
    some_LV = torch.randn(5, size).to(dtype)
    some_LV[0, size // 2] = torch.nan
    some_LV[1, size - 1] = negative_nan
    some_LV[2, 0] = torch.inf
    some_LV[3, :3] = torch.tensor([torch.inf, torch.nan, -torch.inf])
    some_LV[4] = -torch.inf
    return some_LV


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
