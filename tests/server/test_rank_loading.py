"""A tensor-parallel rank that cannot load its share says why, and other errors go through."""

import pytest

from engine.errors import ConfigError
from engine.executors.parallel.messages import RankRefused
from server.rank_loading import loaded_or_refused
from weights.errors import CheckpointError


class Sent(list):
    """The messages of a connection."""

    send = list.append


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CheckpointError("model.safetensors: is cut off"), "model.safetensors: is cut off"),
        (ConfigError("kv_cache_gib: is too large"), "kv_cache_gib: is too large"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nIf reserved"),
            "CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
    ],
)
def test_a_rank_that_cannot_load_says_why(error, reason):
    def load():
        raise error

    sent = Sent()
    assert loaded_or_refused(sent, load) is None
    assert sent == [RankRefused(reason)]


def test_what_is_loaded_is_returned_and_other_errors_go_through():
    sent = Sent()
    assert loaded_or_refused(sent, lambda: "model") == "model"
    with pytest.raises(ZeroDivisionError):
        loaded_or_refused(sent, lambda: 1 / 0)
    assert not sent
