"""What the sampler may choose, and how often."""

import pytest
import torch

from engine.request import RequestError, SamplingParams
from engine.sampler import sample, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.0, 1.5, -1.0, 0.5, -torch.inf, 1.0])


def draw(count: int, seed: int = 5, logits: torch.Tensor = LOGITS, **params) -> torch.Tensor:
    """Draws at positions 0 .. count - 1 of one request."""
    rows = logits.expand(count, -1)
    return torch.tensor(
        sample(rows, [SamplingParams(**params)] * count, [seed] * count, range(count))
    )


def chi_squared(drawn: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic over the tokens that can come; those that cannot must not."""
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible].double() * len(drawn)
    return float(((counts[possible] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    probabilities = (LOGITS.double() / temperature).softmax(0)
    # 99.9 % quantile of chi-squared with 6 degrees of freedom
    assert chi_squared(draw(20_000, temperature=temperature), probabilities) < 22.46


def test_top_k_leaves_the_likeliest():
    kept = LOGITS.double().masked_fill(LOGITS < 1.5, -torch.inf).softmax(0)
    assert chi_squared(draw(20_000, top_k=2), kept) < 10.83


def test_top_p_leaves_the_fewest_that_reach_it():
    # softmax: 0.396, 0.240, 0.146, 0.146, ...: the first three reach 0.7
    kept = LOGITS.double().clone()
    kept[[2, 4, 5, 7]] = -torch.inf
    assert chi_squared(draw(20_000, top_p=0.7), kept.softmax(0)) < 13.82


def test_a_tiny_top_p_takes_the_likeliest():
    assert draw(50, top_p=1e-9).unique().tolist() == [0]


def test_a_tiny_temperature_neither_overflows_nor_wanders():
    assert draw(50, temperature=1e-30).unique().tolist() == [0]


def test_greedy_takes_the_largest():
    assert draw(1, temperature=0).item() == 0


def test_rows_of_a_batch_do_not_touch_each_other():
    logits = torch.randn(6, 50)
    params = [SamplingParams(temperature=t, top_k=k) for t, k in [(0, 0), (1, 5), (2, 0)] * 2]
    seeds, positions = [3, 4, 5, 6, 7, 8], [9, 1, 9, 2, 9, 3]
    together = sample(logits, params, seeds, positions)
    alone = [
        sample(logits[i : i + 1], [params[i]], [seeds[i]], [positions[i]])[0] for i in range(6)
    ]
    assert together == alone


def test_numbers_depend_on_seed_and_position_alone_and_are_uniform():
    numbers = uniform([1] * 5000 + [2] * 5000, [*range(5000), *range(5000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert len(set(numbers.tolist())) == 10_000
    assert uniform([2], [77])[0] == numbers[5077]
    assert abs(numbers.mean() - 0.5) < 0.01 and abs(numbers.std() - 12**-0.5) < 0.01


def test_negative_and_large_seeds_are_seeds():
    assert len(set(uniform([-1, 0, 1, 2**63 - 1, -(2**63)], [0] * 5).tolist())) == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("seed", 2**63),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(RequestError, match=f"^{field}: ") as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
