"""The course of learning rates: up from 0, then down."""

import math

from weights.training.train_config import OptimizerConfig


def lr_share(config: OptimizerConfig, step: int, steps: int) -> float:
    """The share of the highest learning rates in a step, counted from 1, of so many.

    It rises evenly over ``warmup_steps``, then falls to ``least_lr_share`` in the last step, as
    half a cosine or a line, or stays.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    least = config.least_lr_share
    return least + (1 - least) * left[config.decay]
