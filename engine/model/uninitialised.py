"""Torch's layers without initialisation: weights are assigned, or a trainer initialises them.

On the meta device, torch's initialisation imports its compiler, which takes a second and 150 MB.
"""

from torch import nn


class Linear(nn.Linear):
    """``nn.Linear`` with uninitialised parameters."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class ExactLinear(Linear):
    """A small layer whose weights are never rounded to groups: its outputs choose or scale."""


class Embedding(nn.Embedding):
    """``nn.Embedding`` with uninitialised rows."""

    def reset_parameters(self) -> None:
        """Do nothing."""
