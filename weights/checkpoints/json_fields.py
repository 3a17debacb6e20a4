"""Type checks for values of JSON objects."""

from typing import Any

# each layer has a name and modules before its tensors are looked for
MAX_LAYERS = 4096
_MAX_INT, _MAX_FLOAT = 2**24, 1e300


def typed(key: str, value: Any, kind: type) -> Any:
    """``value``, if it has the type ``kind``; an int becomes a float if that is wanted.

    Raises:
        ValueError: it has another type, or is an int beyond 2**24 or a float beyond 1e300 or NaN.
            The message begins with ``key``.
    """
    is_number = kind is float and isinstance(value, int)
    if not (isinstance(value, kind) or is_number) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key}: expected {kind.__name__}, got {value!r}")
    if (kind is int and abs(value) > _MAX_INT) or (kind is float and not abs(value) <= _MAX_FLOAT):
        raise ValueError(f"{key}: {value!r} is out of range")
    return float(value) if is_number else value
