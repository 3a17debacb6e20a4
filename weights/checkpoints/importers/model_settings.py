"""Checks of the settings of a run's model; their errors name the key."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from weights.checkpoints.json_fields import typed


def refuse_unknown(raw: Iterable[str], known: Collection[str]) -> None:
    """Raise ValueError for a key that is not known."""
    for key in raw:
        if key not in known:
            raise ValueError(f"{key!s:.100}: unknown key; it may change the model's output")


def required(raw: Mapping[str, Any], key: str, kind: type) -> Any:
    """The value of a key, which has the type ``kind``; see ``typed``.

    Raises:
        ValueError: the key is missing, or its value has another type or is out of range.
    """
    if key not in raw:
        raise ValueError(f"{key}: missing")
    return typed(key, raw[key], kind)
