"""Torch's layers without torch's initialisation: weights are assigned, or initialised by a trainer.

On the meta device that initialisation draws torch's compiler in, which takes a second and 150 MB.
"""

from torch import nn


class Linear(nn.Linear):
    """``nn.Linear``, its parameters whatever the memory held."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class Embedding(nn.Embedding):
    """``nn.Embedding``, its rows whatever the memory held."""

    def reset_parameters(self) -> None:
        """Do nothing."""
