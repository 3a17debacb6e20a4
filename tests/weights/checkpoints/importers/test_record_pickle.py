"""Pickles are read as data: nothing runs, and no few bytes take much memory or time."""

import pickle
import struct

import pytest

from tests.weights.checkpoints.importers.hostile import Hostile
from weights.checkpoints.importers import record_pickle
from weights.checkpoints.importers.record_pickle import Record, unpickle

KNOWN = {("known", "Thing"): Record, ("known", "pair"): lambda a, b: (b, a)}


PLAIN = [
    *(None, True, False, 0, -3, 300, 2**31, -(2**40), 1.5, "text", [], {}, (), (1,), (1, 2, 3, 4)),
    *([1, [2, "x"]], {"a": {"b": 1}, 3: [4]}, {str(i): i for i in range(300)}),
]


def refusal(data, known=KNOWN):
    with pytest.raises(ValueError, match=r"^cannot be read: ") as caught:
        unpickle(data, known)
    assert len(str(caught.value)) < 300
    return str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_are_read(value, protocol):
    assert unpickle(pickle.dumps(value, protocol), {}) == value


def test_known_names_become_records_or_results():
    thing = b"\x80\x02cknown\nThing\n)\x81}X\x01\x00\x00\x00aK\x07sb."
    assert unpickle(thing, KNOWN).get("a") == 7
    with pytest.raises(ValueError, match="b: missing"):
        unpickle(thing, KNOWN).get("b")
    assert unpickle(b"\x80\x02cknown\npair\nK\x01K\x02\x86R.", KNOWN) == (2, 1)
    with pytest.raises(ValueError, match="a: missing"):
        unpickle(b"\x80\x02cknown\nThing\n)\x81.", KNOWN).get("a")


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_code_is_not_run(tmp_path, protocol):
    refusal(pickle.dumps(Hostile(tmp_path / "x"), protocol))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x02cbuiltins\nbytearray\nK\x01\x85R.", "builtins.bytearray is not known"),
        # an object is called that is no function, or changed that is no record
        (b"\x80\x02X\x01\x00\x00\x00aK\x01\x85R.", "it calls what is no function"),
        (b"\x80\x02cknown\nThing\n)\x81K\x01\x85R.", "it calls what is no function"),
        (b"\x80\x02]}b.", "it changes what is no record"),
        (b"\x80\x02cknown\nThing\n}b.", "it changes what is no record"),
        # keys whose hash takes long
        (b"\x80\x02})K\x01s.", "a key is neither a text nor a small number"),
        (b"\x80\x02]K\x01K\x02s.", "a key is neither a text nor a small number"),
        (b"\x80\x02}\x8a\x09" + (2**61 - 1).to_bytes(9, "little") + b"K\x01s.", "small number"),
        # a call whose arguments are copied
        (b"\x80\x02cknown\nThing\n(" + b"N" * 17 + b"t\x81.", "more than 16 arguments"),
        (b"\x80\x02cknown\nThing\nX\x01\x00\x00\x00aR.", "more than 16 arguments"),
        (b"\x80\x02K\x01Q.", "it refers to objects elsewhere"),
        (b"", "EOFError"),
        (b"\x80\x02", "EOFError"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "EOFError"),
    ],
)
def test_what_is_refused_is_named(data, reason):
    assert reason in refusal(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",  # a number at place 2**31 - 1
        b"\x80\x04\x96" + struct.pack("<Q", 2**40) + b".",  # 2**40 bytes
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",  # a number of 2**31 - 1 bytes
    ],
)
def test_few_bytes_take_little_memory(data):
    try:
        assert unpickle(data, {}) == 1
    except ValueError as error:
        assert "cannot be read" in str(error)


def test_nested_tuples_are_not_hashed():
    # each tuple holds the previous one twice, so its hash would take 2**60 steps
    twice = (b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    reason = refusal(b"\x80\x02})q\x00" + b"".join(twice) + b"K\x01s.")
    assert "a key is neither a text nor a small number" in reason


def test_the_number_of_operations_is_bounded(monkeypatch):
    monkeypatch.setattr(record_pickle, "_MOST_OPERATIONS", 1000)
    assert unpickle(b"\x80\x02]" + b"K\x01a" * 400 + b".", {}) == [1] * 400
    assert "more than 1000 operations" in refusal(b"\x80\x02" + b"}" * 2000 + b".")
