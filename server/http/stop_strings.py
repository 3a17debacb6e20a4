"""Cuts a streamed text at the first stop string, even one that spans several pieces."""

from collections.abc import Sequence


class StopStrings:
    """Holds back the end of a text while it can be the beginning of a stop string.

    The stop string that is complete first wins; the longest one wins if several end at the same
    character. So the cut does not depend on how the text was split.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """``include_stop`` keeps the stop string in the text."""
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text; return the text that is final and, once, the stop string that ended it."""
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops]
        found = [match for match in found if match[0] >= -match[1]]
        if found:
            end, _, stop = min(found)
            self._held = ""
            return text[: end if self._include_stop else end - len(stop)], stop
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def finish(self) -> str:
        """The text held back so far; call it when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` with which ``text`` ends."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
