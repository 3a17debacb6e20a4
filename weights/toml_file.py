"""Reads TOML files strictly, with values of the types that dataclass fields have."""

import math
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from weights.text_files import ENCODING


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file; ConfigError if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding=ENCODING))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None


def typed_value(name: str, value: Any, hint: Any, choices: Sequence[Any] | None = None) -> Any:
    """``value`` as a field of type ``hint`` has it: a list becomes a tuple, an int a float.

    Raises:
        ConfigError: the type is another one, or ``choices`` lacks the value; the message has
            ``name``.
    """
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if isinstance(hint, types.GenericAlias):
        strings = [value] if isinstance(value, str) else value
        if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
            raise ConfigError(f"{name}: expected a list of strings")
        return tuple(strings)
    is_number = hint is float and isinstance(value, int)
    if not (isinstance(value, hint) or is_number) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name}: expected {hint.__name__}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{name}: must be finite, not {value}")
    if choices and value not in choices:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(choices)}")
    return hint(value)
