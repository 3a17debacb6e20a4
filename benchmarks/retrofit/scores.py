"""Scores of a retrofitted model: facts that it recalls, and perplexity of other texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.retrofit.corpus import GLOSSES, PROSE, QUESTIONS
from engine.model.transformer import Transformer
from weights.checkpoints.checkpoint import load_model
from weights.learning.facts import fact_passages, read_asked
from weights.learning.scores import SCORED_TOKENS, answered
from weights.training.corpus import documents
from weights.training.evaluate import score_texts
from weights.training.loss import batch_output
from weights.training.packing import IGNORED_TARGET, Passage, packed_batches
from weights.training.training_data import checkpoint_text


@dataclass(frozen=True)
class RetrofitScores:
    """Fields of the same names in ``RetrofitResult``."""

    recall: float
    answer_loss: float
    gloss_perplexity: float
    prose_perplexity: float


def score_folder(model_folder: Path, corpus: Path) -> RetrofitScores:
    """Score a checkpoint folder's model in fp32 on the texts of a ``GlossCorpus``."""
    model, config = load_model(model_folder, "float32")
    text = checkpoint_text(model_folder)
    facts = read_asked(corpus / QUESTIONS)
    recall, loss = score_answers(model, fact_passages(facts, text, config.model.max_positions))
    return RetrofitScores(
        recall=recall,
        answer_loss=loss,
        gloss_perplexity=score_texts(model, text, documents([corpus / GLOSSES])).perplexity,
        prose_perplexity=score_texts(model, text, documents([corpus / PROSE])).perplexity,
    )


@torch.no_grad()
def score_answers(model: Transformer, passages: Sequence[Passage]) -> tuple[float, float]:
    """The fraction of exact answers, as ``exact_answers``, and the answers' nats per token."""
    exact: list[bool] = []
    nats, tokens = 0.0, 0
    for batch in packed_batches(passages, SCORED_TOKENS):
        logits_LV = batch_output(model, batch, torch.float32).logits_LV
        # given tokens have targets that it ignores
        targets_L = torch.from_numpy(batch.targets_T)
        nats += float(functional.cross_entropy(logits_LV, targets_L, reduction="sum"))
        tokens += int((targets_L != IGNORED_TARGET).sum())
        exact += answered(logits_LV, batch)
    return sum(exact) / len(exact), nats / tokens
