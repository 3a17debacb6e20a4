"""The protocol of a model that learns: what a learning loop changes, steps and saves."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

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

    def state(self) -> Mapping[str, Tensor]:
        """What was learned and the optimiser's moments, to resume from; may share memory."""
        ...

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue from the ``state`` of an equal student after ``step`` steps."""
        ...
