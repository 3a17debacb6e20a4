"""A result of ``memplus bench retrofit``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RetrofitResult:
    """One model, trained at one learning rate from one seed, or the base as it is.

    Attributes:
        name: the contestant's name.
        lr: peak learning rate of weights; 0 for the base.
        seed: random seed of new weights and of the order of documents.
        weights: trained numbers outside the table.
        table_values: trained numbers in the table, whether they are ever read or not.
        steps: optimiser steps.
        tokens: tokens of training.
        recall: fraction of the learned definitions that the model gives exactly.
        answer_loss: nats per token of the learned definitions, given the noun.
        gloss_perplexity: perplexity of definitions of other nouns.
        prose_perplexity: perplexity of prose that has nothing to do with the facts.
        seconds: duration of the training.
    """

    name: str
    lr: float
    seed: int
    weights: int
    table_values: int
    steps: int
    tokens: int
    recall: float
    answer_loss: float
    gloss_perplexity: float
    prose_perplexity: float
    seconds: float
