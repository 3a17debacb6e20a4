"""Cuts a streamed text at the first stop string, even one that spans several pieces."""

from collections.abc import Sequence


class StopStrings:
    """Holds back the end of a text while it can be the beginning of a stop string.

    The stop string that is complete first wins; the longest one wins if several end at the same
    character. So the cut does not depend on how the text was split.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """``include_stop`` keeps the stop string in the text."""
        self._searches = [_Search(stop) for stop in stops]
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text; return the text that is final and, once, the stop string that ended it."""
        found: list[tuple[int, int, str]] = []
        for search in self._searches:
            end = search.push(text)
            if end is not None:
                found.append((end, -len(search.stop), search.stop))
        num_held, text = len(self._held), self._held + text
        if found:
            end, _, stop = min(found)
            self.finish()
            end += num_held
            return text[: end if self._include_stop else end - len(stop)], stop
        final = len(text) - max((search.num_matched for search in self._searches), default=0)
        self._held = text[final:]
        return text[:final], None

    def finish(self) -> str:
        """The text held back so far; call it when no more text comes."""
        held, self._held = self._held, ""
        for search in self._searches:
            search.num_matched = 0
        return held


class _Search:
    """Searches a text for one string by Knuth, Morris and Pratt's method.

    The cost per character is constant on average, whatever text and string are: no part of the text
    is read twice. The table grows only as far as the text matches.

    Attributes:
        stop: the string.
        num_matched: length of the longest beginning of ``stop`` with which the text ends.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        # the length of the longest proper beginning of stop[:i] that is also its end, by i
        self._shorter = [0, 0]

    def push(self, text: str) -> int | None:
        """Add text; return the place in it at which the string ends first, if it does."""
        stop, shorter, matched = self.stop, self._shorter, self.num_matched
        at = 0
        while at < len(text):
            if not matched:
                at = text.find(stop[0], at)
                if at < 0:
                    break
            while matched and text[at] != stop[matched]:
                matched = shorter[matched]
            at += 1
            if text[at - 1] == stop[matched]:
                matched += 1
                if matched == len(stop):
                    return at
                if matched == len(shorter):
                    self._extend()
        self.num_matched = matched
        return None

    def _extend(self) -> None:
        """Add the next entry of the table."""
        stop, shorter = self.stop, self._shorter
        last = stop[len(shorter) - 1]
        length = shorter[-1]
        while length and stop[length] != last:
            length = shorter[length]
        shorter.append(length + (stop[length] == last))
