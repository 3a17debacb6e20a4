"""The text of one choice of a completion: detokenises outputs and applies stop strings."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.request import FinishReason, MemoryRead, TokenOutput
from engine.sampling.params import SamplingParams, TokenLogprobs
from server.http.stop_strings import StopStrings
from weights.checkpoints.detokenizer import IncrementalDetokenizer
from weights.checkpoints.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextOptions:
    """Stop strings of a text, and whether it shows them and special tokens."""

    stops: Sequence[str] = ()
    include_stop: bool = False
    show_special: bool = False


@dataclass(frozen=True)
class TextDelta:
    """The addition of one step to a choice.

    Attributes:
        index: index of the choice in the response.
        text: new characters that are final; can be empty.
        token_ids: the tokens of this step.
        logprobs: one entry per token, if requested.
        prompt_logprobs: one entry per prompt token after the first, if requested; sent once.
        memory_reads: for each token one read per memory layer, if requested.
        finish_reason: set in the last delta.
        stop_reason: the stop string or requested stop token id that ended the choice.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    memory_reads: tuple[tuple[MemoryRead, ...], ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class TextStream:
    """Turns the engine's outputs for one choice into text, cut at stop strings."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        options: TextOptions = TextOptions(),
    ) -> None:
        self._index = index
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, options.show_special)
        self._stops = StopStrings(options.stops, options.include_stop)
        self._include_stop = options.include_stop
        self._sampling = sampling
        self._num_tokens = 0

    def push(self, output: TokenOutput) -> TextDelta:
        """Turn an output into a delta. A stop string sets ``finish_reason`` to ``stop``."""
        ids, reason = output.token_ids, output.finish_reason
        stop_reason: str | int | None = None
        text, stop = "", None
        for count, token_id in enumerate(ids, 1):
            ends = output.stop_token_id is not None and count == len(ids)
            if ends and not self._include_stop:
                break
            more, stop = self._push_one(token_id)
            text += more
            if stop is not None:
                # drop the tokens of this step that follow the stop string
                ids, reason, stop_reason = ids[:count], "stop", stop
                break
        if reason is not None and stop is None:
            more, stop = self._stops.push(self._detokenizer.finish())
            text += more
            if stop is not None:
                reason, stop_reason = "stop", stop
            else:
                text += self._stops.finish()
                # only stop ids of the request are a stop reason, not the end of sequence
                if output.stop_token_id in self._sampling.stop_token_ids:
                    stop_reason = output.stop_token_id
        return TextDelta(
            index=self._index,
            text=text,
            token_ids=ids,
            logprobs=output.logprobs[: len(ids)],
            prompt_logprobs=output.prompt_logprobs,
            memory_reads=output.memory_reads[: len(ids)],
            finish_reason=reason,
            stop_reason=stop_reason,
        )

    def _push_one(self, token_id: int) -> tuple[str, str | None]:
        self._num_tokens += 1
        text = self._detokenizer.push([token_id])
        if self._num_tokens <= self._sampling.min_tokens:
            return self._stops.finish() + text, None  # stop strings count after min_tokens
        return self._stops.push(text)
