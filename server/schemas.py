"""What clients may send to the completions route, checked before anything else happens."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainValidator, model_validator

from engine.request import SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_IDS = 1024
# options of OpenAI and vLLM that are understood only as far as they change nothing
_NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "min_p": 0,
    "n": 1,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "skip_special_tokens": True,
    "suffix": "",
}

Prompt = str | list[str] | list[int] | list[list[int]]


def _check_prompt(prompt: Any) -> Any:
    # by hand, since a union of list types is tried, and reports mistakes, once an element and type
    several = prompt if isinstance(prompt, list) else [prompt]
    if not several:
        raise ValueError("is empty")
    if all(isinstance(part, str) for part in several):
        for text in several:
            _check_text(text)
    elif not (_is_ids(prompt) or all(map(_is_ids, several))):
        raise ValueError("must be a string, a list of strings, of token ids or of such lists")
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


def _check_stop_ids(ids: Any) -> Any:
    if not _is_ids(ids):
        raise ValueError("must be a list of token ids")
    if len(ids) > MAX_STOP_IDS:
        raise ValueError(f"at most {MAX_STOP_IDS} token ids, not {len(ids)}")
    return ids


def _is_ids(value: Any) -> bool:
    # an int that does not fit in 64 bits is a number, but never an id; the engine says so
    return isinstance(value, list) and all(type(part) is int for part in value)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has a lone surrogate, which no text encoding can hold") from None


class _Body(BaseModel):
    """Unknown options are refused; a null stands for an option that was not given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if isinstance(values, bytes):
            raise ValueError("the body must come with Content-Type: application/json")
        if not isinstance(values, dict):
            raise ValueError("the body must be a JSON object")
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(_Body):
    """What a stream carries beside the text."""

    include_usage: bool = False


class CompletionRequest(_Body):
    """The body of ``POST /v1/completions``. Defaults of sampling stand in ``SamplingParams``."""

    prompt: Annotated[Prompt, PlainValidator(_check_prompt)]
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[str], PlainValidator(_check_stop)] = []
    stop_token_ids: Annotated[list[int], PlainValidator(_check_stop_ids)] = []
    ignore_eos: bool | None = None
    add_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
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
    def _check_stream_options(self) -> "CompletionRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: goes with stream alone")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several, all texts or all ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def sampling(self) -> SamplingParams:
        """The engine's part of the request.

        Raises:
            RequestError: a value is out of range.
        """
        names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return SamplingParams(stop_token_ids=frozenset(self.stop_token_ids), **given)
