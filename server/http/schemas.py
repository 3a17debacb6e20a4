"""Validated request bodies of the completions route."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from engine.errors import RequestError
from engine.sampling.params import MAX_LISTED_IDS, SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_SAMPLES = 64
MAX_BAD_WORDS = 256
# options that are accepted only with a value that has no effect
_NEUTRAL: dict[str, Any] = {"suffix": ""}

Prompt = str | list[str] | list[int] | list[list[int]]


def _check_prompt(prompt: Any) -> Any:
    # pydantic would try a union of list types, and report errors, for each element and type
    several = prompt if isinstance(prompt, list) else [prompt]
    if not several:
        raise ValueError("is empty")
    if all(isinstance(part, str) for part in several):
        for text in several:
            _check_text(text)
    elif not (_is_ids(prompt) or all(map(_is_ids, several))):
        raise ValueError(
            "must be a string, token ids, or a list of strings or of lists of token ids"
        )
    return prompt


def _check_stop(stop: Any) -> Any:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise ValueError("must be a string or a list of strings, none of them empty")
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"at most {MAX_STOP_STRINGS} strings, not {len(stops)}")
    if max(map(len, stops), default=0) > MAX_STOP_LENGTH:
        raise ValueError(f"at most {MAX_STOP_LENGTH} characters each")
    return stops


def _check_listed_ids(ids: Any) -> Any:
    if not _is_ids(ids):
        raise ValueError("must be a list of token ids")
    if len(ids) > MAX_LISTED_IDS:
        raise ValueError(f"at most {MAX_LISTED_IDS} token ids, not {len(ids)}")
    return ids


def _check_biases(biases: Any) -> Any:
    if not isinstance(biases, dict) or not all(type(b) in (int, float) for b in biases.values()):
        raise ValueError("must be an object that maps token ids to numbers")
    if len(biases) > MAX_LISTED_IDS:
        raise ValueError(f"at most {MAX_LISTED_IDS} token ids, not {len(biases)}")
    return biases


def _check_bad_words(words: Any) -> Any:
    if not isinstance(words, list) or not all(isinstance(w, str) and w for w in words):
        raise ValueError("must be a list of strings, none of them empty")
    if len(words) > MAX_BAD_WORDS or max(map(len, words), default=0) > MAX_STOP_LENGTH:
        raise ValueError(f"at most {MAX_BAD_WORDS} words of at most {MAX_STOP_LENGTH} characters")
    for word in words:
        _check_text(word)
    return words


def _is_ids(value: Any) -> bool:
    # the engine refuses ints that are no id, such as those that do not fit in 64 bits
    return isinstance(value, list) and all(type(part) is int for part in value)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has a lone surrogate, which UTF-8 cannot encode") from None


class _Body(BaseModel):
    """A JSON object: unknown options are refused, and a null means that an option is not given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if isinstance(values, bytes):
            raise ValueError("the body needs the header Content-Type: application/json")
        if not isinstance(values, dict):
            raise ValueError("the body must be a JSON object")
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(_Body):
    """Options for the token counts in a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class CompletionRequest(_Body):
    """The body of ``POST /v1/completions``. ``SamplingParams`` has the defaults of sampling."""

    prompt: Annotated[Prompt, PlainValidator(_check_prompt)]
    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    best_of: int | None = Field(default=None, ge=1, le=MAX_SAMPLES)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Annotated[dict[str, float], PlainValidator(_check_biases)] = {}
    allowed_token_ids: Annotated[list[int] | None, PlainValidator(_check_listed_ids)] = None
    bad_words: Annotated[list[str], PlainValidator(_check_bad_words)] = []
    stop: Annotated[list[str], PlainValidator(_check_stop)] = []
    stop_token_ids: Annotated[list[int], PlainValidator(_check_listed_ids)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool | None = None
    echo: bool = False
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    priority: int = 0
    cache_salt: str = Field(default="", max_length=256)
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = dict(values)
        for name, neutral in _NEUTRAL.items():
            value = kept.pop(name, None)
            same_type = isinstance(value, bool) == isinstance(neutral, bool)
            if value is not None and (value != neutral or not same_type):
                raise ValueError(f"{name}: only {neutral!r} is supported")
        return kept

    @model_validator(mode="after")
    def _check_together(self) -> "CompletionRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: needs stream to be true")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of: must be at least n ({self.n}), not {self.best_of}")
        if self.num_samples > self.n and self.stream:
            raise ValueError(
                "best_of: more than n cannot be streamed, because all must end before ranking"
            )
        if self.truncate_prompt_tokens == 0:
            raise ValueError(
                "truncate_prompt_tokens: must be -1 or at least 1, because 0 leaves no prompt"
            )
        return self

    @property
    def num_samples(self) -> int:
        """Answers that are generated per prompt; the response contains the ``n`` best."""
        return self.best_of or self.n

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list: either all texts or all token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def sampling(self, bad_words: tuple[tuple[int, ...], ...], sample: int) -> SamplingParams:
        """The sampling parameters of one sample of the request.

        ``bad_words`` are the request's bad words as token ids. A given seed is increased by the
        index of the sample.

        Raises:
            RequestError: a value is out of range.
        """
        given = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if self.seed is not None:
            given["seed"] = self.seed + sample
        if self.echo and (self.logprobs is not None or not given.get("max_tokens", 1)):
            given["prompt_logprobs"] = max(self.logprobs or 0, self.prompt_logprobs or 0)
        if self.num_samples > self.n:
            given.setdefault("logprobs", 0)  # they rank the samples
        allowed = self.allowed_token_ids
        return SamplingParams(
            stop_token_ids=frozenset(self.stop_token_ids),
            allowed_token_ids=None if allowed is None else frozenset(allowed),
            logit_bias=tuple(_biases(self.logit_bias)),
            bad_words=bad_words,
            **given,
        )


_SAMPLING = (
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
    "logprobs",
    "prompt_logprobs",
)


def _biases(biases: dict[str, float]) -> Iterator[tuple[int, float]]:
    for name, bias in biases.items():
        if not (name.isascii() and name.isdigit()) or len(name) > 9:
            raise RequestError("logit_bias", f"{name[:20]!r} is not a token id")
        yield int(name), bias
