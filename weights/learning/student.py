"""The protocol of a trainable model, which the learning loop runs and updates."""

from typing import Protocol

from engine.model.transformer import Transformer


class Student(Protocol):
    """A model whose changes are learned.

    The loop runs ``model``, calls ``backward`` on its loss, then ``step``.

    Attributes:
        model: the model with what was learned so far; it runs with gradients.
    """

    model: Transformer

    def step(self, lr_share: float) -> float:
        """Apply and clear the gradients of the last backward passes; return their norm unclipped.

        ``lr_share`` multiplies the peak learning rate.

        Raises:
            TrainingError: the norm is not finite; nothing was changed.
        """
        ...

    def finish(self) -> None:
        """Round what was learned to the dtype in which it is stored."""
        ...
