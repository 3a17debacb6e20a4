"""The record of a trained contestant, to which each curve adds its scores."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainedContestant:
    """One contestant, trained from one seed.

    Attributes:
        name: the contestant's name.
        kind: kind of the second feed-forward.
        rows: rows of its table, 0 without one.
        seed: random seed of the weights and of the document order.
        parameters: number of parameters, tables excluded.
        flops: operations per token of a forward pass.
        scoring_flops: the part of ``flops`` that scores subkeys and candidates.
        tokens: tokens of training.
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
    seconds: float
