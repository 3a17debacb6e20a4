"""Sliding windows: a layer that sees fewer tokens limits the positions, others do not."""

import pytest

from weights.checkpoints.window_json import parse_window

MIXED = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("raw", "window"),
    [
        ({}, None),
        ({"use_sliding_window": False}, None),
        ({"use_sliding_window": True}, None),
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": 4096, "use_sliding_window": True}, 4096),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"layer_types": ["full_attention"] * 2}, None),
        ({"layer_types": MIXED, "sliding_window": 16}, 16),
    ],
)
def test_the_window(raw, window):
    assert parse_window(raw, 2) == window


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"sliding_window": 0}, "sliding_window: must be greater than 0"),
        ({"sliding_window": 1.5}, "sliding_window: expected int"),
        ({"use_sliding_window": 1}, "use_sliding_window: expected bool"),
        ({"layer_types": MIXED}, "layer_types: sliding_attention needs a sliding_window"),
        (
            {"layer_types": MIXED, "sliding_window": 9, "use_sliding_window": False},
            "layer_types: sliding_attention needs",
        ),
        ({"layer_types": MIXED[:1]}, "layer_types: names 1 layers of 2"),
        ({"layer_types": ["full_attention", 3]}, "layer_types: 3 is not supported"),
        ({"layer_types": "full"}, "layer_types: expected list"),
    ],
)
def test_a_wrong_value_is_named(raw, message):
    with pytest.raises(ValueError, match=message):
        parse_window(raw, 2)
