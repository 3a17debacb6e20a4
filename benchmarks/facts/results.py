"""A result of ``memplus bench facts``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One model, trained from one seed.

    Attributes:
        name: the contestant's name.
        kind: kind of the second feed-forward.
        rows: rows of its table, 0 without one.
        seed: random seed of the weights and of the document order.
        parameters: number of parameters, tables excluded.
        flops: operations per token of a forward pass.
        scoring_flops: the part of ``flops`` that scores subkeys and candidates.
        tokens: tokens of training.
        recall: fraction of the questions answered correctly.
        loss: nats per token on new texts of the same facts.
        perplexity: perplexity of the same texts.
        seconds: duration of the training.
    """

    name: str
    kind: str
    rows: int
    seed: int
    parameters: int
    flops: int
    scoring_flops: int
    tokens: int
    recall: float
    loss: float
    perplexity: float
    seconds: float
