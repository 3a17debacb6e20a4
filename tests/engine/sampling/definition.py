"""Sampled tokens by their definition in fp64, and inputs that every sampler is tested with."""

import itertools

import numpy as np
import torch
from hypothesis import strategies as st

from engine.sampling.choice import CHOICE

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


def check(sample, logits_V, choice, most_draws=MOST_DRAWS, num_random=50):
    """Check draws at both ends, in the middle of each token's interval, and at random."""
    exact_V, nudge = logits_V.double().numpy(), FLOOR_TOLERANCE
    nudges = itertools.product((0, nudge), (0, -nudge, nudge), (0, nudge))
    definitions = [kept_weights(exact_V, choice, *three) for three in nudges]
    shares_V = definitions[0] / definitions[0].sum()
    middles = (shares_V.cumsum() - shares_V / 2)[shares_V > 0]
    middles = middles[:: -(-len(middles) // most_draws)]
    uniforms = np.concatenate(
        ([0, 1 - 2**-53], middles, np.random.default_rng(1).random(num_random))
    )
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
