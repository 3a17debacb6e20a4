"""The keys of config.json for sliding windows of attention.

In texts that are not longer than the window it changes nothing: so it limits the positions.
"""

from collections.abc import Mapping
from typing import Any

from weights.checkpoints.json_fields import typed

WINDOW_KEYS = {"layer_types", "sliding_window", "use_sliding_window"}
USES_WINDOW = True  # without use_sliding_window
_LAYER_TYPES = ("full_attention", "sliding_attention")


def parse_window(raw: Mapping[str, Any], num_layers: int) -> int | None:
    """The tokens that a layer with a sliding window sees, with the newest; None without a window.

    ``raw`` has no null values.

    Raises:
        ValueError: a value is not supported; the message begins with the key.
    """
    window = None
    if "sliding_window" in raw:
        window = typed("sliding_window", raw["sliding_window"], int)
        if window < 1:
            raise ValueError(f"sliding_window: must be greater than 0, not {window}")
    if not typed("use_sliding_window", raw.get("use_sliding_window", USES_WINDOW), bool):
        window = None
    kinds = typed("layer_types", raw.get("layer_types", []), list)
    if kinds and len(kinds) != num_layers:
        raise ValueError(f"layer_types: names {len(kinds)} layers of {num_layers}")
    for kind in kinds:
        if kind not in _LAYER_TYPES:
            supported = ", ".join(_LAYER_TYPES)
            raise ValueError(f"layer_types: {kind!r} is not supported; must be one of {supported}")
        if kind == "sliding_attention" and window is None:
            raise ValueError("layer_types: sliding_attention needs a sliding_window")
    return window
