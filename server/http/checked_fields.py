"""Checked types of request fields: prompts, stop strings, token ids, biases and bad words."""

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from engine.sampling.params import MAX_LISTED_IDS

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_BAD_WORDS = 256

Prompts = str | list[str] | list[int] | list[list[int]]


def check_text(text: str) -> str:
    """Return ``text``; ValueError if it has a lone surrogate, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has a lone surrogate, which UTF-8 cannot encode") from None
    return text


def _check_prompt(prompt: Any) -> Any:
    # pydantic would try a union of list types, and report errors, for each element and type
    several = prompt if isinstance(prompt, list) else [prompt]
    if not several:
        raise ValueError("is empty")
    if all(isinstance(part, str) for part in several):
        for text in several:
            check_text(text)
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
    for name in biases:
        if not (name.isascii() and name.isdigit()) or len(name) > 9:
            raise ValueError(f"{name[:20]!r} is not a token id")
    return biases


def _check_bad_words(words: Any) -> Any:
    if not isinstance(words, list) or not all(isinstance(w, str) and w for w in words):
        raise ValueError("must be a list of strings, none of them empty")
    if len(words) > MAX_BAD_WORDS or max(map(len, words), default=0) > MAX_STOP_LENGTH:
        raise ValueError(f"at most {MAX_BAD_WORDS} words of at most {MAX_STOP_LENGTH} characters")
    for word in words:
        check_text(word)
    return words


def _is_ids(value: Any) -> bool:
    # the engine refuses ints that are no id, such as those that do not fit in 64 bits
    return isinstance(value, list) and all(type(part) is int for part in value)


def _array(items: dict[str, Any], most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most}


# pydantic's own schema would not know the checks above
_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_ID = {"type": "integer", "minimum": 0}
_IDS = {"type": "array", "items": _ID, "minItems": 1}
_PROMPTS = [
    {"type": "string", "minLength": 1},
    {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
    _IDS,
    {"type": "array", "items": _IDS, "minItems": 1},
]
_BIASES = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": MAX_LISTED_IDS,
}

PromptField = Annotated[Prompts, PlainValidator(_check_prompt), WithJsonSchema({"anyOf": _PROMPTS})]
StopField = Annotated[
    list[str],
    PlainValidator(_check_stop),
    WithJsonSchema({"anyOf": [_TEXT, _array(_TEXT, MAX_STOP_STRINGS)]}),
]
ListedIds = Annotated[
    list[int], PlainValidator(_check_listed_ids), WithJsonSchema(_array(_ID, MAX_LISTED_IDS))
]
Biases = Annotated[dict[str, float], PlainValidator(_check_biases), WithJsonSchema(_BIASES)]
BadWords = Annotated[
    list[str], PlainValidator(_check_bad_words), WithJsonSchema(_array(_TEXT, MAX_BAD_WORDS))
]
