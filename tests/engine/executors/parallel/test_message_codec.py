"""Messages as bytes: every message comes back, and other bytes give one kind of error only."""

import json
import typing
from dataclasses import dataclass, fields, is_dataclass
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from engine.executors.cuda.buckets import StepShape
from engine.executors.parallel import messages
from engine.executors.parallel.message_codec import MessageError, decoded, encoded

KINDS = tuple(
    dict.fromkeys(
        kind
        for union in (messages.RankMessage, messages.NodeAnswer, messages.JoinAnswer)
        for kind in typing.get_args(union)
    )
)
INTS = st.integers(-(2**63), 2**63 - 1)
IDS = arrays(np.int64, array_shapes(max_dims=1, min_side=0), elements=INTS)
BYTES = arrays(np.uint8, array_shapes(max_dims=2, min_side=0))
INT_TUPLES = st.lists(INTS, max_size=5).map(tuple)
TEXTS = st.text(max_size=20)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
USES = st.lists(st.lists(st.tuples(INTS, FLOATS), max_size=3), max_size=3)
FORWARDS = st.builds(
    messages.RunForward,
    *(IDS, IDS, INT_TUPLES, IDS, INT_TUPLES, st.lists(INT_TUPLES, max_size=4), IDS, USES),
    INT_TUPLES,
)
SHAPES = st.builds(StepShape, INTS, INTS, INTS, st.booleans(), INTS, INTS)
STRATEGIES = {
    messages.RankReady: st.builds(messages.RankReady),
    messages.RankRefused: st.builds(messages.RankRefused, TEXTS),
    messages.RankDied: st.builds(messages.RankDied, INTS, INTS, INTS),
    messages.NodeJoin: st.builds(
        messages.NodeJoin, INTS, st.dictionaries(TEXTS, TEXTS, max_size=4), INTS
    ),
    messages.JoinRefused: st.builds(messages.JoinRefused, TEXTS),
    messages.StartRanks: st.builds(messages.StartRanks, INTS),
    messages.MeetOthers: st.builds(messages.MeetOthers, INTS),
    messages.RunForward: FORWARDS,
    messages.RunStep: st.builds(messages.RunStep, FORWARDS, INT_TUPLES, SHAPES),
    messages.CaptureStep: st.builds(messages.CaptureStep, SHAPES, INT_TUPLES),
    messages.AddPatch: st.builds(
        messages.AddPatch,
        *(INTS, TEXTS, st.dictionaries(INTS, INTS, max_size=3)),
        st.lists(st.tuples(IDS, BYTES, TEXTS), max_size=3),
        INT_TUPLES,
    ),
}
MESSAGES = st.one_of(*STRATEGIES.values())


def received(message, kinds=KINDS):
    """The message that another process gets."""
    header, parts = encoded(message)
    data = b"".join(part.tobytes() for part in parts)
    return decoded(header, np.frombuffer(bytearray(data), np.uint8), kinds)


def plain(value):
    """A value with tuples for all sequences, lists for arrays and tuples for dataclasses."""
    if isinstance(value, np.ndarray):
        return (value.dtype.name, value.shape, value.tolist())
    if is_dataclass(value):
        return (type(value), *(plain(getattr(value, one.name)) for one in fields(value)))
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    return value


def test_every_message_has_a_strategy():
    assert set(STRATEGIES) == set(KINDS)


@given(MESSAGES)
def test_every_message_comes_back(message):
    assert plain(received(message)) == plain(message)


@given(MESSAGES)
def test_arrays_are_aligned_and_can_be_written(message):
    for one in vars(received(message)).values():
        if isinstance(one, np.ndarray):
            assert one.flags.writeable and one.ctypes.data % 8 == 0


@given(MESSAGES)
def test_a_message_of_another_kind_is_refused(message):
    others = [kind for kind in KINDS if kind is not type(message)]
    with pytest.raises(MessageError):
        received(message, others)


def decoded_or_refused(header, body):
    """Whether bytes are a message; any error but ``MessageError`` passes."""
    try:
        decoded(header, np.frombuffer(bytearray(body), np.uint8), KINDS)
    except MessageError:
        return False
    return True


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@given(st.binary(max_size=200), st.binary(max_size=64))
def test_garbage_is_refused(header, body):
    assert not decoded_or_refused(header, body)


@given(st.sampled_from([kind.__name__ for kind in KINDS]), JSON, JSON, st.binary(max_size=64))
def test_other_contents_are_refused_or_make_a_message(name, packed, described, body):
    header = json.dumps([name, packed, described]).encode()
    assert decoded_or_refused(header, body) in (True, False)


@given(MESSAGES, st.data())
def test_damaged_messages_are_refused_or_make_a_message(message, data):
    header, parts = encoded(message)
    body = b"".join(part.tobytes() for part in parts)
    at = data.draw(st.integers(0, len(header) - 1))
    damaged = header[:at] + data.draw(st.binary(max_size=3)) + header[at + 1 :]
    assert decoded_or_refused(damaged, body) in (True, False)
    if body:
        assert not decoded_or_refused(header, body[:-8])
    assert not decoded_or_refused(header, body + bytes(8))


@pytest.mark.parametrize(
    "header",
    [
        b'["RankReady",[],[["int64",[-1]]]]',
        b'["RankReady",[],[["int64",[0,1000000000000000000000000]]]]',
        b'["RankReady",[],[["float64",[0]]]]',
        b'["RankReady",[],[["int64",[0]]]]',
        b'["RankReady",[],[[["int64"],[0]]]]',
        b'["RankReady",[null],[]]',
        b'["StartRanks",[1e400],[]]',
        b'["StartRanks",[NaN],[]]',
        b'["StartRanks",[true],[]]',
        b'["StartRanks",[9223372036854775808],[]]',
        b'["StartRanks",' + b"[" * 100_000,
        b'["RankRefused",[7],[]]',
        b'["NodeJoin",[1,[["a","b"],["a","c"]],1],[]]',
        b'["NodeJoin",[1,{"a":"b"},1],[]]',
        b'["\\udfff",[],[]]',
        b"\xff\xfe",
        b"",
    ],
)
def test_malformed_headers_are_refused(header):
    assert not decoded_or_refused(header, b"")


class Shape(NamedTuple):
    """A named tuple of a message."""

    tokens: int
    is_decode: bool


@dataclass(frozen=True)
class Nested:
    """A message with another message and a named tuple."""

    inner: messages.RankDied
    shape: Shape
    scale: float = 1.0


def test_messages_have_dataclasses_and_named_tuples():
    message = Nested(messages.RankDied(3, 99, -9), Shape(7, True), 2)
    found = received(message, (Nested,))
    assert found == message and isinstance(found.shape, Shape)


def test_a_field_of_another_type_is_our_own_mistake():
    @dataclass(frozen=True)
    class Wrong:
        file: type

    with pytest.raises(TypeError, match="messages have no fields of the type"):
        encoded(Wrong(int))
