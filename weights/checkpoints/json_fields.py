"""Values of a JSON object, of the type that they should have."""

import math
from typing import Any

_LARGEST = 2**24


def typed(key: str, value: Any, kind: type) -> Any:
    """``value`` itself, an int where a float is expected included.

    Raises:
        ValueError: it is of another type, or no number of any model; the message begins with
            ``key``.
    """
    number = kind is float and isinstance(value, int)
    if not (isinstance(value, kind) or number) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key}: expected {kind.__name__}, got {value!r}")
    if (kind is int and abs(value) > _LARGEST) or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{key}: {value!r} is larger than any model's")
    return value
