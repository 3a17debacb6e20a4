"""The message with which a hostile file is refused."""

from collections.abc import Callable
from typing import Any

import pytest

from weights.errors import CheckpointError

MOST_CHARACTERS = 1000


def refusal(read: Callable[..., object], *arguments: Any) -> str:
    """The message of the CheckpointError that a call raises: one line that a terminal can show."""
    with pytest.raises(CheckpointError) as caught:
        read(*arguments)
    message = str(caught.value)
    assert message.isprintable() and 0 < len(message) <= MOST_CHARACTERS
    return message
