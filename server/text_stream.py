"""One choice of a completion: the engine's tokens become text that ends where it should."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.request import FinishReason, TokenOutput
from server.stop_strings import StopStrings
from weights.detokenizer import IncrementalDetokenizer
from weights.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextDelta:
    """What one step adds to a choice.

    Attributes:
        index: which choice of the response.
        text: characters that are certain now, perhaps none.
        token_ids: the tokens of this step.
        finish_reason: set once, in the last delta.
        stop_reason: the stop string or the asked-for stop id that ended it.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class TextStream:
    """The text of one choice, stop strings cut off."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
        stop_token_ids: frozenset[int],
    ) -> None:
        self._index = index
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids)
        self._stops = StopStrings(stops)
        self._stop_token_ids = stop_token_ids

    def push(self, output: TokenOutput) -> TextDelta:
        """Turn an output into text. A ``stop`` that the engine did not give ends the choice."""
        ids = output.token_ids
        shown = ids if output.stop_token_id is None else ids[:-1]
        text = self._detokenizer.push(shown)
        if output.finish_reason is not None:
            text += self._detokenizer.finish()
        text, stop = self._stops.push(text)
        if stop is not None:
            return TextDelta(self._index, text, ids, "stop", stop)
        if output.finish_reason is None:
            return TextDelta(self._index, text, ids)
        text += self._stops.finish()
        # the model's own end of sequence is no reason that anyone asked for
        stop_id = output.stop_token_id if output.stop_token_id in self._stop_token_ids else None
        return TextDelta(self._index, text, ids, output.finish_reason, stop_id)
