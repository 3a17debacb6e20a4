"""A result of ``memplus bench learn``."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningResult:
    """One contestant that learned the facts of one draw.

    Attributes:
        task: model and facts.
        contestant: way to learn.
        lr: peak learning rate.
        replay_share: part of a step's tokens that is replayed text.
        seed: seed of the draw.
        num_learned: numbers that could change.
        recall: fraction of the facts that are answered exactly.
        rephrased: the same for phrasings that were not learned; 0 without any.
        lost: fraction of the answers that the model gave before which it no longer gives, of texts
            that may be replayed.
        lost_held_out: the same of other texts.
        perplexity_before: perplexity of neutral text, by the model before.
        perplexity: the same, by the model after.
        divergence: KL(before || after) on the same text, in nats per token.
        exact_step: step after which all facts were exact; -1 if that never happened.
        steps: steps in all.
        seconds: time of these steps.
    """

    task: str
    contestant: str
    lr: float
    replay_share: float
    seed: int
    num_learned: int
    recall: float
    rephrased: float
    lost: float
    lost_held_out: float
    perplexity_before: float
    perplexity: float
    divergence: float
    exact_step: int
    steps: int
    seconds: float


ENOUGH_RECALL = 0.95
# of the draw on which learning rates are chosen; those that are reported have smaller seeds
RATE_SEED = 1000


def best_lr(results: list[LearningResult]) -> float:
    """Of the rates that teach enough, the one that loses least of what is not replayed; else the
    one that teaches most.
    """
    best = max(results, key=lambda one: (min(one.recall, ENOUGH_RECALL), -one.lost_held_out))
    return best.lr


def share(answers: Sequence[bool]) -> float:
    """The fraction that is true of some answers."""
    return sum(answers) / len(answers)
