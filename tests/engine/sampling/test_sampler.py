"""The sampler: distributions, logit rules, log-probabilities and parameter limits."""

import numpy as np
import pytest
import torch
from scipy import stats

from engine.errors import RequestError
from engine.executors.cpu.kernels import cpu_kernels
from engine.sampling.params import SamplingParams
from engine.sampling.request_rules import RequestRules, SamplingRow
from engine.sampling.sampler import Sampler, uniform

KERNELS = cpu_kernels(torch.device("cpu"), torch.float32)
SAMPLER = Sampler() if KERNELS is None else Sampler(KERNELS.sample, KERNELS.log_probabilities)
LOGITS = torch.tensor([2.0, 1.0, 0.0, 1.5, -1.0, 0.5, -torch.inf, 1.0])
DRAWS = 20_000


def row(seed=5, history=(), prompt_length=0, eos_ids=frozenset(), **params) -> SamplingRow:
    given = SamplingParams(**params)
    rules = None
    if given.has_rules_after(max(len(history) - prompt_length, 0)):
        rules = RequestRules(given, prompt_length, eos_ids)
        rules.follow(history)
    return SamplingRow(given, seed, max(len(history), prompt_length), rules)


def draw(logits=LOGITS, count=DRAWS, history=(), prompt_length=0, eos_ids=frozenset(), **params):
    """Tokens drawn with ``count`` seeds at one position, after ``history``."""
    one = row(history=history, prompt_length=prompt_length, eos_ids=eos_ids, **params)
    rows = [one._replace(seed=seed) for seed in range(count)]
    return torch.tensor(SAMPLER.sample(logits.expand(count, -1), rows))


def check(drawn: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Pearson's chi-squared test; impossible tokens must never come."""
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible].double() * len(drawn)
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    assert statistic <= stats.chi2.ppf(0.999, max(int(possible.sum()) - 1, 1))


def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().softmax(0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    check(draw(temperature=temperature), softmax(LOGITS / temperature))


def test_draws_follow_the_softmax_of_a_large_vocabulary():
    logits = torch.randn(1000) * 3
    drawn, probabilities = draw(logits), softmax(logits)
    # ten groups of equal probability, by rank
    order = probabilities.argsort()
    group = torch.empty(1000, dtype=torch.int64)
    group[order] = (probabilities[order].cumsum(0) * 10).long().clamp(max=9)
    check(group[drawn], torch.zeros(10).double().index_add_(0, group, probabilities))


def test_top_k_keeps_the_likeliest():
    check(draw(top_k=2), softmax(LOGITS.masked_fill(LOGITS < 1.5, -torch.inf)))


def test_top_p_keeps_the_fewest_that_reach_it():
    # softmax: 0.396, 0.240, 0.146, 0.146, ...: three reach 0.7; the fourth ties with the third
    check(draw(top_p=0.7), softmax(LOGITS.masked_fill(LOGITS < 1.0, -torch.inf)))
    check(draw(top_p=0.5), softmax(LOGITS.masked_fill(LOGITS < 1.5, -torch.inf)))


def test_top_p_applies_after_top_k():
    # the first two have more than 0.6 of the sum of the three likeliest
    kept = LOGITS.clone()
    kept[[1, 2, 4, 5, 7]] = -torch.inf
    check(
        draw(LOGITS + torch.tensor([0, 0, 0, 0, 0, 0, 0, -0.1]), top_k=3, top_p=0.6), softmax(kept)
    )


def test_a_flat_distribution_needs_more_than_the_likeliest_thousand():
    drawn = draw(torch.zeros(4000), top_p=0.9)
    assert drawn.unique().numel() > 3000


def test_min_p_is_relative_to_the_likeliest():
    check(draw(min_p=0.3), softmax(LOGITS.masked_fill(LOGITS < 0.8, -torch.inf)))


def test_logit_bias_shifts_and_forbids_tokens():
    expected = LOGITS.clone()
    expected[4] += 3
    expected[0] -= 100
    check(draw(logit_bias=((4, 3.0), (0, -100.0))), softmax(expected))


def test_only_allowed_ids_are_drawn():
    check(draw(allowed_token_ids=frozenset({1, 4})), softmax(LOGITS)[[1, 4]].new_tensor(
        [0, *softmax(LOGITS[[1, 4]])[:1], 0, 0, *softmax(LOGITS[[1, 4]])[1:], 0, 0, 0]
    ))  # fmt: skip


def test_penalties_follow_their_formulas():
    history, prompt_length = (0, 4, 4, 3, 3), 2
    expected = LOGITS.double().clone()
    for token in (0, 3, 4):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    expected[4] -= 0.4 * 1 + 0.2
    expected[3] -= 0.4 * 2 + 0.2
    params = {"repetition_penalty": 1.5, "frequency_penalty": 0.4, "presence_penalty": 0.2}
    check(draw(history=history, prompt_length=prompt_length, **params), softmax(expected))


def test_a_bad_word_cannot_be_completed():
    banned = softmax(LOGITS.clone().index_fill_(0, torch.tensor([3]), -torch.inf))
    words = {"bad_words": ((7, 2, 3),)}
    check(draw(history=(1, 7, 2), **words), banned)
    check(draw(history=(1, 7, 1), **words), softmax(LOGITS))
    check(draw(history=(2,), **words), softmax(LOGITS))
    check(draw(bad_words=((3,),)), banned)


def test_an_answer_does_not_end_before_min_tokens():
    params = {"min_tokens": 2, "max_tokens": 5, "stop_token_ids": frozenset({3})}
    banned = LOGITS.clone().index_fill_(0, torch.tensor([0, 3]), -torch.inf)
    early = {"eos_ids": frozenset({0}), "prompt_length": 4}
    check(draw(history=(1,) * 5, **early, **params), softmax(banned))
    check(draw(history=(1,) * 6, **early, **params), softmax(LOGITS))


@pytest.mark.parametrize(
    ("sampler", "dtype"),
    [
        (SAMPLER, torch.float32),
        (SAMPLER, torch.bfloat16),
        (Sampler(), torch.float16),
        (Sampler(), torch.float64),
    ],
)
def test_a_bitmask_allows_only_its_bits(sampler, dtype):
    bitmask = np.zeros((2, 2), dtype=np.uint32)
    bitmask[0, 0], bitmask[1, 1] = 0b10010, 0b1
    logits = torch.randn(2, 40).to(dtype)
    drawn = {
        tuple(sampler.sample(logits, [row(seed=s), row(seed=s)], bitmask=bitmask))
        for s in range(200)
    }
    assert drawn == {(1, 32), (4, 32)}
    assert logits.isfinite().all()  # unchanged


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.zeros(2, 700)
    logits[0, [600, 650]] = 1.0
    logits[1, [3, 4]] = 1.0
    assert SAMPLER.sample(logits, [row(temperature=0)] * 2) == [600, 3]
    assert SAMPLER.sample(logits.bfloat16(), [row(temperature=0)] * 2) == [600, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [5, 1024, 1025, 3000])
@pytest.mark.parametrize("shift", [0.0, -100.0, 100.0])
def test_greedy_equals_argmax(dtype, vocab_size, shift):
    logits = (torch.randn(7, vocab_size) + shift).to(dtype)
    assert SAMPLER.sample(logits, [row(temperature=0)] * 7) == logits.float().argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-30, 1e-300])
def test_a_tiny_temperature_takes_the_likeliest_without_overflow(temperature):
    assert draw(count=50, temperature=temperature).unique().tolist() == [0]


def test_a_tiny_top_p_takes_the_likeliest():
    assert draw(count=50, top_p=1e-9).unique().tolist() == [0]


def test_rows_of_a_batch_are_independent():
    logits = torch.randn(8, 300)
    choices = [
        {"temperature": 0},
        {"top_k": 5},
        {"temperature": 2.0, "top_p": 0.5},
        {"repetition_penalty": 2.0},
        {"logit_bias": ((1, 5.0),)},
        {"allowed_token_ids": frozenset({3, 4, 5})},
        {"bad_words": ((9,),), "min_p": 0.1},
        {"min_tokens": 3, "max_tokens": 9},
    ]
    given = {"history": (1, 2, 9), "eos_ids": frozenset({8})}
    rows = [row(seed=i, **given, **choice) for i, choice in enumerate(choices)]
    together = SAMPLER.sample(logits, rows)
    alone = [SAMPLER.sample(logits[i : i + 1], [one])[0] for i, one in enumerate(rows)]
    assert together == alone


def test_the_logits_stay_unchanged():
    logits = torch.randn(1, 20)
    before = logits.clone()
    SAMPLER.sample(logits, [row(logit_bias=((1, 5.0),), top_k=3)])
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


def test_random_numbers_depend_only_on_seed_and_position_and_are_uniform():
    numbers = uniform([1] * 5000 + [2] * 5000, [*range(5000), *range(5000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert len(set(numbers.tolist())) == 10_000
    assert uniform([2], [77])[0] == numbers[5077]
    assert stats.kstest(numbers, "uniform").pvalue > 0.001


def test_negative_and_large_seeds_give_different_numbers():
    assert len(set(uniform([-1, 0, 1, 2**63 - 1, -(2**63)], [0] * 5).tolist())) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_equal_the_full_log_softmax(dtype):
    logits = (torch.randn(5, 3000) * 4).to(dtype)
    exact = logits.double().log_softmax(-1)
    rows, ids = [i % 5 for i in range(200)], [(7 * i) % 3000 for i in range(200)]
    found = list(SAMPLER.log_probabilities(logits, rows, ids, counts=[i % 5 for i in range(200)]))
    assert [entry.token_id for entry in found] == ids
    for at, entry in enumerate(found):
        line = exact[rows[at]]
        assert entry.logprob == pytest.approx(float(line[entry.token_id]), abs=1e-5)
        assert entry.rank == int((line > line[entry.token_id]).sum()) + 1
        best = line.topk(at % 5)
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert [float(line[i]) for i, _ in entry.top] == pytest.approx(best.values.tolist())


BAD = [
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": 0}),
    ("min_tokens", {"min_tokens": 17}),
    ("temperature", {"temperature": -1.0}),
    ("temperature", {"temperature": float("nan")}),
    ("temperature", {"temperature": float("inf")}),
    ("top_k", {"top_k": -2}),
    ("top_p", {"top_p": 0.0}),
    ("top_p", {"top_p": 1.5}),
    ("min_p", {"min_p": -0.1}),
    ("repetition_penalty", {"repetition_penalty": 0.0}),
    ("presence_penalty", {"presence_penalty": 2.5}),
    ("frequency_penalty", {"frequency_penalty": float("nan")}),
    ("seed", {"seed": 2**63}),
    ("logit_bias", {"logit_bias": ((1, 1e9),)}),
    ("logit_bias", {"logit_bias": tuple((i, 1.0) for i in range(5000))}),
    ("allowed_token_ids", {"allowed_token_ids": frozenset()}),
    ("allowed_token_ids", {"allowed_token_ids": frozenset({1}), "bad_words": ((1,),)}),
    ("bad_words", {"bad_words": ((),)}),
    ("logprobs", {"logprobs": 21}),
    ("prompt_logprobs", {"prompt_logprobs": -1}),
]


@pytest.mark.parametrize(("field", "values"), BAD)
def test_a_value_out_of_range_is_named(field, values):
    with pytest.raises(RequestError, match=f"^{field}: ") as caught:
        SamplingParams(**values)
    assert caught.value.param == field
