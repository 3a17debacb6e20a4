"""Turns the messages of tensor-parallel ranks into bytes and back, without running code."""

import functools
import json
import math
import typing
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
Arrays = list[Array]
_DTYPES: Mapping[str, Any] = {"int64": np.int64, "uint8": np.uint8}
_ALIGNMENT = 8  # of each array in the bytes: kernels read them in place
_MOST_DIMENSIONS = 8


class MessageError(ValueError):
    """Bytes are not a message that this process takes."""


class Frame(NamedTuple):
    """A message as bytes: a JSON header, then arrays, each padded to 8 bytes."""

    header: bytes
    parts: Sequence[Bytes]

    @property
    def num_array_bytes(self) -> int:
        """Bytes after the header."""
        return sum(part.nbytes for part in self.parts)


class _Codec(NamedTuple):
    """Packs values of one type into JSON and arrays, and unpacks them in the same order."""

    pack: Callable[[Any, Arrays], Any]
    unpack: Callable[[Any, Iterator[Array]], Any]


def encoded(message: Any) -> Frame:
    """The bytes of a message, a dataclass instance; its arrays are not copied.

    Fields have the types int, float, bool, str, arrays of int64 or uint8, and sequences,
    mappings, dataclasses and named tuples of them.
    """
    arrays: Arrays = []
    kind: Any = type(message)
    packed = _codec(kind).pack(message, arrays)
    described = [[one.dtype.name, list(one.shape)] for one in arrays]
    header = json.dumps([kind.__name__, packed, described], separators=(",", ":"))
    parts = []
    for one in arrays:
        parts.append(one.reshape(-1).view(np.uint8))
        if padding := -one.nbytes % _ALIGNMENT:
            parts.append(np.zeros(padding, np.uint8))
    return Frame(header.encode(), parts)


def decoded(header: bytes, body: Bytes, kinds: Iterable[type]) -> Any:
    """The message, one of ``kinds``; its arrays are views of ``body``, which is 8-byte aligned.

    Raises:
        MessageError: the bytes are no such message.
    """
    try:
        name, packed, described = json.loads(header, parse_constant=_refuse)
        (kind,) = [one for one in kinds if one.__name__ == name]
        arrays = iter(_arrays(described, body))
        message = _codec(kind).unpack(packed, arrays)
        if next(arrays, None) is not None:
            raise MessageError("a message has more arrays than fields")
        return message
    except MessageError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise MessageError(f"a message is malformed: {str(error)[:200]}") from None


def _refuse(text: str) -> None:
    raise MessageError(f"a message has the number {text}")


def _arrays(described: Any, body: Bytes) -> Arrays:
    found, offset = [], 0
    for name, shape in described:
        if name not in _DTYPES or len(shape) > _MOST_DIMENSIONS:
            raise MessageError("a message has an array of an unknown dtype or shape")
        for size in shape:
            if type(size) is not int or size < 0:
                raise MessageError("a message has an array of a malformed shape")
        num_bytes = math.prod(shape) * np.dtype(_DTYPES[name]).itemsize
        if offset + num_bytes > len(body):
            raise MessageError("a message is shorter than its arrays")
        data = body[offset : offset + num_bytes]
        found.append(data.view(_DTYPES[name]).reshape(shape))
        offset += num_bytes + -num_bytes % _ALIGNMENT
    if offset != len(body):
        raise MessageError("a message is longer than its arrays")
    return found


@functools.cache
def _codec(hint: Any) -> _Codec:
    """The codec of a type; TypeError for types that messages do not have."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, float, bool, str):
        return _plain(hint)
    if origin is np.ndarray:
        return _Codec(_pack_array, functools.partial(_unpack_array, dtype=_element_dtype(hint)))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key, value = map(_codec, arguments)
        return _mapping(_record(tuple, (key, value), tuple))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return _record(tuple, tuple(map(_codec, arguments)), tuple)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _sequence(arguments[0])
    if isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, tuple)):
        hints = typing.get_type_hints(hint)
        names = [one.name for one in fields(hint)] if is_dataclass(hint) else [*hints]

        def values(value: Any) -> tuple[Any, ...]:
            return tuple(getattr(value, name) for name in names)

        return _record(lambda found: hint(*found), tuple(_codec(hints[n]) for n in names), values)
    raise TypeError(f"messages have no fields of the type {hint}")


def _plain(kind: type) -> _Codec:
    def unpack(data: Any, arrays: Iterator[Array]) -> Any:
        # JSON has one kind of numbers
        if kind is float and type(data) is int:
            data = float(data) if abs(data) < 2**53 else None
        is_wrong = type(data) is not kind
        if (
            is_wrong
            or (kind is int and not -(2**63) <= data < 2**63)
            or data in (math.inf, -math.inf)
        ):
            raise MessageError(f"a message has no {kind.__name__} where it needs one")
        return data

    return _Codec(lambda value, arrays: value, unpack)


def _element_dtype(hint: Any) -> Any:
    """The dtype that an array type names; None if it takes both."""
    (element,) = typing.get_args(typing.get_args(hint)[1])
    return None if element is Any else element


def _pack_array(value: Array, arrays: Arrays) -> None:
    assert value.dtype.name in _DTYPES
    arrays.append(np.ascontiguousarray(value))


def _unpack_array(data: Any, arrays: Iterator[Array], dtype: Any) -> Array:
    found = next(arrays, None)
    if found is None or data is not None or dtype not in (None, found.dtype):
        raise MessageError("a message lacks an array, or has one of another dtype")
    return found


def _mapping(pairs: _Codec) -> _Codec:
    def pack(value: Mapping[Any, Any], arrays: Arrays) -> Any:
        return [pairs.pack(pair, arrays) for pair in value.items()]

    def unpack(data: Any, arrays: Iterator[Array]) -> Any:
        found = dict([pairs.unpack(pair, arrays) for pair in _listed(data)])
        if len(found) != len(data):
            raise MessageError("a message has a key twice")
        return found

    return _Codec(pack, unpack)


def _record(
    make: Callable[[Any], Any],
    codecs: tuple[_Codec, ...],
    values: Callable[[Any], tuple[Any, ...]],
) -> _Codec:
    """Values of different types, as a list."""

    def pack(value: Any, arrays: Arrays) -> Any:
        pairs = zip(codecs, values(value), strict=True)
        return [codec.pack(one, arrays) for codec, one in pairs]

    def unpack(data: Any, arrays: Iterator[Array]) -> Any:
        pairs = zip(codecs, _listed(data), strict=True)
        return make(tuple([codec.unpack(one, arrays) for codec, one in pairs]))

    return _Codec(pack, unpack)


def _sequence(element: Any) -> _Codec:
    """Values of one type. Integers, and sequences of them, are arrays: steps have thousands."""
    if element is int:
        return _Codec(lambda value, arrays: arrays.append(_ints(value)), _unpack_ints)
    if _is_ints(element):
        return _Codec(_pack_ragged, _unpack_ragged)
    codec = _codec(element)

    def unpack(data: Any, arrays: Iterator[Array]) -> Any:
        return tuple([codec.unpack(one, arrays) for one in _listed(data)])

    return _Codec(lambda value, arrays: [codec.pack(one, arrays) for one in value], unpack)


def _is_ints(hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    is_sequence = isinstance(origin, type) and issubclass(origin, Sequence)
    return is_sequence and arguments in ((int,), (int, Ellipsis))


def _ints(values: Iterable[int]) -> Array:
    found = array("q", values)
    return np.frombuffer(found, np.int64) if found else np.empty(0, np.int64)


def _unpack_ints(data: Any, arrays: Iterator[Array]) -> tuple[int, ...]:
    found = _unpack_array(data, arrays, np.int64)
    if found.ndim != 1:
        raise MessageError("a message has an array of another shape")
    return tuple(found.tolist())


def _pack_ragged(value: Sequence[Sequence[int]], arrays: Arrays) -> None:
    arrays.append(_ints(map(len, value)))
    arrays.append(_ints(chain.from_iterable(value)))


def _unpack_ragged(data: Any, arrays: Iterator[Array]) -> tuple[tuple[int, ...], ...]:
    lengths, flat = _unpack_ints(data, arrays), _unpack_ints(data, arrays)
    if any(length < 0 for length in lengths) or sum(lengths) != len(flat):
        raise MessageError("a message has sequences of other lengths")
    ends = list(accumulate(lengths))
    return tuple(flat[end - one : end] for one, end in zip(lengths, ends, strict=True))


def _listed(data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise MessageError("a message has no list where it needs one")
    return data
