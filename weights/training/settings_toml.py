"""Writes the settings of a run as TOML that ``memplus train`` reads back."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from weights.training.train_config import TrainConfig


def settings_toml(config: TrainConfig) -> list[str]:
    """Lines of a TOML file from which ``read_train_config`` makes an equal config."""
    return [line for name, section in asdict(config).items() for line in _section(name, section)]


def toml_value(value: object) -> str:
    """A value as TOML, on one line: a boolean, number, string, list, tuple or mapping."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        pairs = (f"{_string(key)} = {toml_value(one)}" for key, one in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(toml_value, value))}]"
    return str(value)


def _section(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    """The section's own keys, then the sections inside it, as TOML demands."""
    inner = {key: one for key, one in values.items() if isinstance(one, Mapping) and one}
    yield f"[{name}]"
    for key, value in values.items():
        if key not in inner:
            yield f"{_key(key)} = {toml_value(value)}"
    for key, value in inner.items():
        yield from _section(f"{name}.{_key(key)}", value)


def _key(key: str) -> str:
    is_bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if is_bare else _string(key)


def _string(text: str) -> str:
    # a JSON string is one of TOML, except that TOML escapes the delete character too
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
