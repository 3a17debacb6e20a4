"""Exams: scores as JSON, and the lines that describe them."""

import pytest
import torch

from tests.models import plain_greedy
from tests.weights.learning.learned import BACKGROUND, FACTS, memory_model
from weights.errors import TrainingError
from weights.learning.exams import Exams, describe
from weights.training.packing import Passage


def known_by(model):
    """Passages whose answers are those of a model, and one that is not."""
    prompts = ([5, 9, 2], [7, 3], [30, 31])
    known = [Passage((*ids, *plain_greedy(model, ids, 3)), len(ids)) for ids in prompts]
    return [*known, FACTS[0]]


def test_known_facts_that_are_lost_are_counted():
    base, model = memory_model(), memory_model()
    same = Exams(FACTS, known=known_by(base)).score(base, model)
    assert same["known"] == {"asked": 4, "exact_before": 3, "lost": 0}
    assert same["facts"] == {"asked": 3, "exact": 0, "recall": 0.0}
    assert set(same) == {"facts", "known"}
    torch.manual_seed(1)
    for table in model.tables.values():
        table.rows.copy_(torch.randn_like(table.rows) * 4)
    scores = Exams(FACTS, known_by(model), BACKGROUND, known_by(base)).score(base, model)
    assert scores["questions"] == {"asked": 4, "exact": 3, "recall": 0.75}
    assert 0 < scores["known"]["lost"] <= 3 and scores["neutral"]["tokens"] == 64
    lines = describe(scores).splitlines()
    assert lines[:2] == ["facts      0 of 3 exact: 0.0%", "questions  3 of 4 exact: 75.0%"]
    lost = scores["known"]["lost"]
    assert lines[2] == f"known      {lost} lost of 3 that were exact before (4 asked)"
    assert lines[3].startswith("neutral    perplexity ")


@pytest.mark.parametrize("name", ["facts", "questions", "neutral", "known"])
def test_a_score_of_logits_that_are_not_finite_is_refused_by_name(name):
    base, model = memory_model(), memory_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[250] = torch.nan
    exams = Exams(**({"facts": FACTS} | {name: [Passage((250, 1, 2))]}))
    with pytest.raises(TrainingError, match=f"{name}: the model's logits are not finite"):
        exams.score(base, model)
