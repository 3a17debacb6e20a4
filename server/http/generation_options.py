"""Request fields that completions and chat completions share, and their sampling parameters."""

from abc import abstractmethod
from dataclasses import fields
from typing import Any

from pydantic import Field, model_validator

from engine.request import MAX_PRIORITY
from engine.sampling.grammar import Grammar
from engine.sampling.params import SamplingParams
from server.http.checked_fields import BadWords, Biases, ListedIds, StopField
from server.http.named_patches import NamedPatches
from server.http.request_body import RequestBody
from server.http.structured_output import ResponseFormat, StructuredOutputs

MAX_SAMPLES = 64
MAX_TIMEOUT_S = 86400
_HELP = {field.name: field.metadata.get("help", "") for field in fields(SamplingParams)}


def sampling_field(name: str, default: Any = None) -> Any:
    """A field with the description of a sampling parameter; SamplingParams checks its range."""
    shown = next(f.default for f in fields(SamplingParams) if f.name == name)
    text = _HELP[name] if shown is None else f"{_HELP[name]} (default: {shown})"
    return Field(default=default, description=text)


class StreamOptions(RequestBody):
    """Options for the token counts in a stream."""

    include_usage: bool = Field(
        default=False, description="send one more chunk with the usage and without choices"
    )
    continuous_usage_stats: bool = Field(
        default=False, description="send the usage so far in every chunk"
    )
    include_obfuscation: bool = Field(
        default=False, description="accepted for OpenAI's clients; only false is supported"
    )

    @model_validator(mode="after")
    def _check_obfuscation(self) -> "StreamOptions":
        if self.include_obfuscation:
            raise ValueError("include_obfuscation: only false is supported")
        return self


class GenerationOptions(RequestBody):
    """Fields of every request that generates tokens."""

    model: str | None = Field(
        default=None, description="the served model's name, or MODEL+PATCH with a row patch"
    )
    max_tokens: int | None = sampling_field("max_tokens")
    min_tokens: int | None = sampling_field("min_tokens")
    temperature: float | None = sampling_field("temperature")
    top_k: int | None = sampling_field("top_k")
    top_p: float | None = sampling_field("top_p")
    min_p: float | None = sampling_field("min_p")
    repetition_penalty: float | None = sampling_field("repetition_penalty")
    presence_penalty: float | None = sampling_field("presence_penalty")
    frequency_penalty: float | None = sampling_field("frequency_penalty")
    seed: int | None = sampling_field("seed")
    ignore_eos: bool | None = sampling_field("ignore_eos")
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES, description="answers per prompt")
    logit_bias: Biases = Field(
        default={}, description="numbers from -100 to 100 added to the logits of these token ids"
    )
    allowed_token_ids: ListedIds | None = Field(
        default=None, description="the only token ids that may be generated"
    )
    bad_words: BadWords = Field(default=[], description="words that are not generated")
    stop: StopField = Field(default=[], description="strings that end an answer")
    stop_token_ids: ListedIds = Field(default=[], description="token ids that end an answer")
    include_stop_str_in_output: bool = Field(
        default=False, description="keep the stop string in the text"
    )
    skip_special_tokens: bool = Field(
        default=True, description="leave the names of special tokens out of the text"
    )
    response_format: ResponseFormat | None = Field(
        default=None, description="the format of the answer, as OpenAI's clients send it"
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="a grammar for the answer, as vLLM's clients send it"
    )
    stream: bool = Field(default=False, description="send the answer as server-sent events")
    stream_options: StreamOptions | None = Field(
        default=None, description="options for token counts; needs stream"
    )
    return_token_ids: bool = Field(
        default=False, description="return the ids of the prompt and of the answers"
    )
    return_tokens_as_token_ids: bool = Field(
        default=False, description="name tokens token_id:N in log-probabilities"
    )
    memory_trace: bool | None = Field(
        default=None,
        description="return the rows that memory layers read for each token, and their weights",
    )
    memory_patches: NamedPatches | None = Field(
        default=None,
        description="row patches to use, by name; without it, the server's default ones",
    )
    priority: int = Field(
        default=0,
        ge=-MAX_PRIORITY,
        le=MAX_PRIORITY,
        description="smaller runs sooner; other than 0 only if the server allows it",
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        le=MAX_TIMEOUT_S,
        description="end the request with an error after this many seconds",
    )
    cache_salt: str = Field(
        default="", max_length=256, description="only requests with the same salt share KV blocks"
    )
    user: str | None = Field(default=None, description="accepted for OpenAI's clients; not used")

    @model_validator(mode="after")
    def _check_one_grammar(self) -> "GenerationOptions":
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("structured_outputs: cannot be combined with response_format")
        return self

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationOptions":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: needs stream to be true")
        return self

    @property
    def num_samples(self) -> int:
        """Answers that are generated per prompt; the response contains the ``n`` best."""
        return self.n

    def grammar(self) -> Grammar | None:
        """The grammar that the answers must follow; RequestError if it is empty or too long."""
        format = self.response_format or self.structured_outputs
        return None if format is None else format.grammar()

    @abstractmethod
    def decided(self, most_tokens: int) -> dict[str, Any]:
        """Sampling parameters that depend on the route.

        ``most_tokens`` is the number of tokens that the model can add to the prompt.
        """

    def sampling(
        self, most_tokens: int, bad_words: tuple[tuple[int, ...], ...] = (), sample: int = 0
    ) -> SamplingParams:
        """The sampling parameters of one sample of the request.

        ``bad_words`` are the request's bad words as token ids. A given seed is increased by the
        index of the sample.

        Raises:
            RequestError: a value is out of range.
        """
        given = {name: getattr(self, name) for name in _SHARED if getattr(self, name) is not None}
        if self.seed is not None:
            given["seed"] = self.seed + sample
        allowed = self.allowed_token_ids
        return SamplingParams(
            stop_token_ids=frozenset(self.stop_token_ids),
            allowed_token_ids=None if allowed is None else frozenset(allowed),
            logit_bias=tuple((int(name), bias) for name, bias in self.logit_bias.items()),
            bad_words=bad_words,
            **given | self.decided(most_tokens),
        )


_SHARED = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "memory_trace",
)
