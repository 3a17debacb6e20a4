"""Whether the engine gets on: what tells a slow step from one that hangs."""

import time


class Progress:
    """When the engine last got on with its work; read by the thread that tells the outside.

    A step as a whole may take long on a slow machine; its pieces, marked each, should not: a layer,
    the logits, the choice of tokens.
    """

    def __init__(self) -> None:
        self._last: float | None = None

    @property
    def stalled_s(self) -> float:
        """Seconds since the last mark, 0 while there is nothing to do."""
        last = self._last
        return 0.0 if last is None else time.monotonic() - last

    def mark(self) -> None:
        """Say that something was done, or begins."""
        self._last = time.monotonic()

    def skip(self) -> None:
        """Leave out the time until now, in which the process itself was stopped."""
        if self._last is not None:
            self.mark()

    def rest(self) -> None:
        """Say that there is nothing to do."""
        self._last = None
