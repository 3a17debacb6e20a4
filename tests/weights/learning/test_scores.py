"""Scores: exact answers against greedy decoding, and drift against plain formulas."""

import math

import torch

from tests.models import plain_greedy, plain_logits
from tests.weights.learning.learned import BACKGROUND, FACTS, memory_model
from weights.learning.scores import exact_answers, score_drift
from weights.training.packing import Passage


def test_an_answer_is_exact_if_greedy_decoding_gives_it():
    model = memory_model()
    found = tuple(plain_greedy(model, [5, 9, 2], 4))
    right = Passage((5, 9, 2, *found), 3)
    wrong = [Passage((5, 9, 2, *found[:at], 250, *found[at + 1 :]), 3) for at in range(4)]
    assert exact_answers(model, [right, *wrong, right]) == [True, *[False] * 4, True]
    assert exact_answers(model, FACTS) == [False] * 3


def test_drift_is_the_mean_over_tokens():
    base, model = memory_model(), memory_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    found = score_drift(base, model, BACKGROUND)
    nats, divergences, tokens = [0.0, 0.0], 0.0, 0
    for passage in BACKGROUND:
        ids, targets = list(passage.ids[:-1]), torch.tensor(passage.ids[1:])
        both = [plain_logits(one, ids).double().log_softmax(-1) for one in (base, model)]
        for which, logs in enumerate(both):
            nats[which] -= float(logs.gather(1, targets[:, None]).sum())
        divergences += float((both[0].exp() * (both[0] - both[1])).sum())
        tokens += len(ids)
    assert found.tokens == tokens
    wanted = [math.exp(one / tokens) for one in nats] + [divergences / tokens]
    scores = [found.perplexity_before, found.perplexity, found.divergence]
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(scores, wanted, strict=True))
