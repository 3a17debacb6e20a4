"""The protocol by which a grammar or the like binds what a request may generate."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TokenMask(Protocol):
    """A state that follows one request's tokens."""

    def fill(self, bitmask: NDArray[np.uint32]) -> None:
        """Set bit ``i % 32`` of word ``i // 32`` for every token id ``i`` that may come next.

        ``bitmask`` is zeroed, ``[ceil(vocabulary / 32)]``. A mask that allows nothing ends its
        request with an error.
        """
        ...

    def accept(self, token_ids: Sequence[int]) -> None:
        """Follow these tokens, each of which was allowed when its turn came."""
        ...

    def rollback(self, count: int) -> None:
        """Forget the last ``count`` accepted tokens."""
        ...
