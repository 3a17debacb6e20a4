"""A result of ``memplus bench facts``."""

from dataclasses import dataclass

from benchmarks.curves.results import TrainedContestant


@dataclass(frozen=True)
class Result(TrainedContestant):
    """One model, trained from one seed, and its scores.

    Attributes:
        recall: fraction of the questions answered correctly.
        loss: nats per token on new texts of the same facts.
        perplexity: perplexity of the same texts.
    """

    recall: float
    loss: float
    perplexity: float
