"""Token choice: the kernel against torch, and against the definition in fp64."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from engine.executors.cuda.kernels.choose_tokens import choose_tokens, choose_tokens_reference
from engine.sampling.choice import CHOICE, NO_TOKEN, choose
from tests.engine.sampling.definition import (
    EVERY_KIND,
    check,
    choices,
    invalid_rows,
    kept_weights,
    logits,
)

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LAST = 1 - 2**-53


def on_device(rows) -> Tensor:
    """Choices as the kernel reads them, with other numbers between the rows."""
    columns = [torch.from_numpy(rows[name].astype(np.float64)) for name in CHOICE.names]
    padded = torch.full((len(rows), 7), torch.nan, dtype=torch.float64)
    padded[:, :5] = torch.stack(columns, dim=1)
    return padded[:, :5]


def sample(logits_LV: Tensor, rows, kernel=choose_tokens) -> Tensor:
    """Ids from a kernel; the padding between rows of logits is NaN."""
    count, vocab_size = logits_LV.shape
    padded = torch.full((count, vocab_size + 13), torch.nan, dtype=logits_LV.dtype)
    padded[:, :vocab_size] = logits_LV
    seats_L, chosen_L = torch.arange(count), torch.full((count,), -9)
    last_token_P = torch.full((count,), -9)
    kernel(padded[:, :vocab_size], on_device(rows), seats_L, chosen_L, last_token_P)
    assert torch.equal(last_token_P, chosen_L.clamp(min=0))
    return chosen_L


def drawn_rows(count: int, seed: int, **kind) -> np.ndarray:
    """Choices of different temperatures with random uniform numbers."""
    generator = np.random.default_rng(seed)
    return choices(
        count,
        temperature=generator.choice([0, 1e-30, 0.1, 0.7, 1.0, 100.0], count),
        uniform=generator.random(count),
        **{name: generator.choice(values, count) for name, values in kind.items()},
    )


@each_dtype
@pytest.mark.parametrize("vocab_size", [1, 7, 260, 1000])
def test_random_draws_equal_those_of_torch(vocab_size, dtype):
    logits_LV = (torch.randn(20, vocab_size) * 3).to(dtype)
    rows = drawn_rows(20, vocab_size)
    assert torch.equal(sample(logits_LV, rows), choose(logits_LV, rows))


FILTERS = {"top_k": [-1, 0, 1, 5, 999], "top_p": [1.0, 0.9, 0.3], "min_p": [0.0, 0.05]}


@each_dtype
@pytest.mark.parametrize("vocab_size", [7, 1000, 49_152])
def test_filtered_draws_equal_those_of_torch(vocab_size, dtype):
    count = 4
    logits_LV = (torch.randn(count, vocab_size) * 3).to(dtype)
    rows = drawn_rows(count, vocab_size, **FILTERS)
    assert torch.equal(sample(logits_LV, rows), choose(logits_LV, rows))


# fewer pairs, because the tests above have the others
@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [*zip((7, 260, 1000), DTYPES, strict=True), *((5000, dtype) for dtype in DTYPES)],
)
def test_many_draws_equal_those_of_torch(vocab_size, dtype):
    logits_LV = (torch.randn(60, vocab_size) * 3).to(dtype)
    rows = drawn_rows(60, vocab_size + 1, **FILTERS)
    assert torch.equal(sample(logits_LV, rows), choose(logits_LV, rows))


# a k-th weight that no other reaches; ties at the k-th; a floor below the least weight
@example(torch.arange(12.0), torch.float32, 1.0, 5, 1.0, 0.0)
@example(torch.arange(12.0) // 4, torch.bfloat16, 1.0, 5, 0.5, 0.0)
@example(torch.arange(12.0) * 30, torch.float16, 1.0, 9, 1.0, 0.0)
@example(torch.arange(12.0) * 30, torch.float16, 1.0, 9, 0.999999999, 0.0)
@given(
    logits_V=logits(),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1e-300, 1e-30, 0.01, 0.7, 1.0, 3.0, 100.0]),
    top_k=st.sampled_from([-1, 0, 1, 2, 7, 50, 400, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-9]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_a_token_is_drawn_within_its_interval_of_the_distribution(
    logits_V, dtype, temperature, top_k, top_p, min_p
):
    choice = choices(1, temperature, top_k, top_p, min_p)[0]
    check(sample, logits_V.to(dtype), choice, most_draws=3, num_random=2)


def shifted(logits_LV, rows):
    rows = rows.copy()
    rows["uniform"] = np.maximum(rows["uniform"] - 1e-3, 0)
    return choose(logits_LV, rows)


def one_token_too_many(logits_LV, rows):
    rows = rows.copy()
    rows["top_k"] += 1
    return choose(logits_LV, rows)


@pytest.mark.parametrize("wrong", [shifted, one_token_too_many])
def test_the_definition_rejects_a_wrong_sampler(wrong):
    logits_V, choice = torch.randn(50), choices(1, top_k=7)[0]
    check(choose, logits_V, choice)
    with pytest.raises(AssertionError):
        check(wrong, logits_V, choice, num_random=2000)


@pytest.mark.parametrize(("size", "dtype"), [*zip((1, 8, 300), DTYPES, strict=True)])
def test_a_number_on_the_border_of_two_tokens_gives_the_second(size, dtype):
    places = np.arange(0, size, -(-size // 8))
    for kind in ({}, {"top_p": 0.5}, {"top_k": 1}, {"top_k": size}, {"min_p": 1.0}):
        rows = choices(len(places), temperature=0.3, uniform=places / size, **kind)
        equal_LV = torch.full((len(places), size), 7.0, dtype=dtype)
        assert sample(equal_LV, rows).tolist() == places.tolist()


@each_dtype
@pytest.mark.parametrize("vocab_size", [260, 5000])
def test_both_ends_of_the_uniform_numbers(vocab_size, dtype):
    logits_LV = torch.zeros(4, vocab_size, dtype=dtype)
    # ids without weight at both ends; a weight in the last block alone
    logits_LV[:, [0, 1, vocab_size - 1]] = -torch.inf
    logits_LV[2:, :-2] = -torch.inf
    rows = choices(4, uniform=[0, LAST, 0, LAST])
    assert sample(logits_LV, rows).tolist() == [2, *[vocab_size - 2] * 3]


@each_dtype
@pytest.mark.parametrize("vocab_size", [5, 256, 5000])
def test_nan_and_infinity_give_no_token_and_do_not_affect_other_rows(vocab_size, dtype):
    good_LV = torch.randn(5, vocab_size).to(dtype)
    bad_LV = invalid_rows(vocab_size, torch.float32).to(dtype)
    mixed_LV = torch.stack((good_LV, bad_LV), dim=1).flatten(0, 1)
    for kind in EVERY_KIND[:1] if vocab_size == 5000 else EVERY_KIND[::3]:
        chosen_L = sample(mixed_LV, choices(10, **kind))
        assert chosen_L[1::2].tolist() == [NO_TOKEN] * 5
        assert torch.equal(chosen_L[::2], choose(good_LV, choices(5, **kind)))


@each_dtype
@pytest.mark.parametrize("vocab_size", [7, 260, 9000])
def test_greedy_takes_the_first_of_the_largest(vocab_size, dtype):
    logits_LV = torch.randn(24, vocab_size).to(dtype)
    logits_LV[:12] = logits_LV[:12].round()
    rows = choices(24, temperature=0, top_k=3, top_p=0.5)
    assert torch.equal(sample(logits_LV, rows), logits_LV.float().argmax(-1))


def test_the_first_of_equal_logits_in_several_tiles():
    logits_LV = torch.zeros(2, 12_288)
    logits_LV[1, [5, 5 + 4096, 5 + 8192]] = 1.0
    assert sample(logits_LV, choices(2, temperature=0)).tolist() == [0, 5]


def test_more_rows_than_a_batch_has():
    logits_LV = torch.randn(200, 40)
    rows = choices(200, temperature=0)
    assert torch.equal(sample(logits_LV, rows), logits_LV.argmax(-1))


@each_dtype
def test_zeros_of_both_signs_are_equal(dtype):
    logits_LV = torch.full((1, 700), -1.0, dtype=dtype)
    logits_LV[0, [300, 400, 650]] = torch.tensor([-0.0, 0.0, -0.0], dtype=dtype)
    assert sample(logits_LV, choices(temperature=0)).tolist() == [300]


@pytest.mark.parametrize("kind", [{"top_k": 5}, {"min_p": 1.0}])
def test_nearly_equal_logits_differ_only_by_rounding(kind):
    logits_V = torch.randn(40) * 1e-5
    rows = choices(20, uniform=np.arange(20) / 20, **kind)
    drawn = sample(logits_V.expand(20, -1), rows)
    floor = logits_V.topk(kind.get("top_k", 1)).values[-1]
    assert (logits_V[drawn] >= floor - 1.2e-6).all()
    assert set((logits_V >= floor).nonzero().flatten().tolist()) <= set(drawn.tolist())


@pytest.mark.parametrize("kind", [{"top_k": 1}, {"top_k": 2}, {"min_p": 1.0}])
def test_a_weight_below_the_floor_by_rounding_is_kept(kind):
    rows = choices(4, uniform=[0.0, 0.4, 0.6, LAST], **kind)
    logits_LV = torch.tensor([-1e-4, 0.0, -5e-7, -2e-6]).expand(4, -1)
    assert sample(logits_LV, rows).tolist() == [1, 1, 2, 2]
    assert torch.equal(choose(logits_LV, rows), sample(logits_LV, rows))


def test_draws_have_the_right_frequencies():
    logits_V, count = torch.randn(5), 100
    rows = choices(count, temperature=0.7, uniform=np.random.default_rng(2).random(count))
    expected_V = kept_weights(logits_V.double().numpy(), rows[0])
    drawn = np.bincount(sample(logits_V.expand(count, -1), rows).numpy(), minlength=5)
    assert stats.chisquare(drawn, expected_V / expected_V.sum() * count).pvalue > 0.001


@pytest.mark.parametrize("kind", [{"top_k": 5}, {"top_p": 0.8}, {"top_k": 6, "min_p": 0.1}])
def test_filtered_draws_have_the_right_frequencies(kind):
    logits_V, count = torch.randn(8), 100
    rows = choices(count, uniform=np.random.default_rng(3).random(count), **kind)
    expected_V = kept_weights(logits_V.double().numpy(), rows[0])
    drawn = np.bincount(sample(logits_V.expand(count, -1), rows).numpy(), minlength=8)
    assert not drawn[expected_V == 0].any()
    kept = expected_V > 0
    expected = expected_V[kept] / expected_V.sum() * count
    assert stats.chisquare(drawn[kept], expected).pvalue > 0.001


@pytest.mark.parametrize("kernel", [choose_tokens, choose_tokens_reference])
def test_tokens_go_to_their_seats(kernel):
    logits_LV = torch.eye(4, 9)
    logits_LV[1, 5] = torch.nan
    seats_L, chosen_L = torch.tensor([3, 0, -1, 5]), torch.full((4,), -9)
    last_token_P = torch.full((7,), 77)
    kernel(logits_LV, on_device(choices(4, temperature=0)), seats_L, chosen_L, last_token_P)
    assert chosen_L.tolist() == [0, NO_TOKEN, 2, 3]
    assert last_token_P.tolist() == [0, 77, 77, 0, 77, 3, 77]


@pytest.mark.parametrize("kernel", [choose_tokens, choose_tokens_reference])
def test_no_row_and_a_row_of_any_stride(kernel):
    none, last_token_P = torch.zeros(0, dtype=torch.int64), torch.full((2,), 77)
    kernel(torch.zeros(0, 9), on_device(choices(0)), none, none, last_token_P)
    assert last_token_P.tolist() == [77, 77]
    row_LV = torch.tensor([0.0, 3.0, 1.0]).as_strided((1, 3), (1, 1))
    one = torch.zeros(1, dtype=torch.int64)
    kernel(row_LV, on_device(choices(1, temperature=0)), one, one.clone(), last_token_P)
    assert last_token_P.tolist() == [1, 77]


def test_a_row_does_not_depend_on_its_batch():
    rows = np.concatenate([choices(1, **kind) for kind in EVERY_KIND])
    rows["uniform"] = np.random.default_rng(3).random(len(rows))
    logits_LV = torch.randn(len(rows), 3000).bfloat16()
    together = sample(logits_LV, rows)
    order = torch.randperm(len(rows))
    assert torch.equal(sample(logits_LV[order], rows[order.numpy()]), together[order])
    assert torch.equal(sample(logits_LV[:1], rows[:1]), together[:1])


def test_logits_whose_columns_have_gaps_are_refused():
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(AssertionError, match="the logits of a row are contiguous"):
        choose_tokens(torch.zeros(1, 8)[:, ::2], on_device(choices(1)), one, one, one)


@each_dtype
def test_a_large_vocabulary(dtype):
    logits_V = (torch.randn(49_155) * 4).to(dtype)
    check(sample, logits_V, choices(1, 0.8, 50, 0.9)[0], most_draws=2, num_random=2)
