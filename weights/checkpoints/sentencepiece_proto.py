"""Reads and writes the protobuf fields of serialised sentencepiece models."""

from collections.abc import Iterator, Mapping

# sentencepiece's ModelProto.SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# wire types
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# field numbers of ModelProto, its SentencePiece, its TrainerSpec and its NormalizerSpec
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_NAME, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARACTER_MAP, _ADD_DUMMY_PREFIX, _REMOVE_WHITESPACES, _ESCAPE_WHITESPACES = 2, 3, 4, 5
# TrainerSpec.ModelType
BPE = 2
_NO_SCORE = bytes([_SCORE << 3 | _FIXED32, 0, 0, 0, 0])


def with_pieces(model: bytes, pieces: Mapping[int, tuple[str, int]]) -> bytes:
    """The model with these pieces, each a name and a type, at their ids or at its end.

    Raises:
        ValueError: the bytes are not protobuf.
    """
    messages = {
        i: field(_NAME, name.encode()) + _NO_SCORE + field(_TYPE, kind)
        for i, (name, kind) in pieces.items()
    }
    parts: list[bytes] = []
    index = 0
    for number, value in _fields(model) if pieces else ():
        if number == _PIECES:
            value = messages.pop(index, value)
            index += 1
        parts.append(field(number, value))
    parts += [field(_PIECES, messages[i]) for i in sorted(messages)]
    return b"".join(parts) if pieces else model


def without_prefix(model: bytes) -> bytes:
    """The model without the space that it adds before a text."""
    # a later field overrides an earlier one
    return model + field(_NORMALIZER, field(_ADD_DUMMY_PREFIX, 0))


def adds_prefix(model: bytes) -> bool:
    """Whether the model adds a space before a text (ValueError: the bytes are not protobuf)."""
    return bool(_settings(model, _NORMALIZER).get(_ADD_DUMMY_PREFIX, 1))


def is_plain_bpe(model: bytes) -> bool:
    """Whether the model merges the characters of a text that it does not normalise.

    Raises:
        ValueError: the bytes are not protobuf.
    """
    trainer, normalizer = _settings(model, _TRAINER), _settings(model, _NORMALIZER)
    return bool(
        trainer.get(_MODEL_TYPE, 1) == BPE
        and trainer.get(_BYTE_FALLBACK, 0)
        and not trainer.get(_WHITESPACE_AS_SUFFIX, 0)
        and not normalizer.get(_CHARACTER_MAP, b"")
        and not normalizer.get(_REMOVE_WHITESPACES, 1)
        and normalizer.get(_ESCAPE_WHITESPACES, 1)
    )


def user_defined_ids(model: bytes) -> list[int]:
    """Ids of the pieces that are matched before anything else.

    Raises:
        ValueError: the bytes are not protobuf.
    """
    ending = field(_TYPE, USER_DEFINED)
    pieces = (message for number, message in _fields(model) if number == _PIECES)
    return [
        index
        for index, message in enumerate(pieces)
        # a cheap check first, because a vocabulary may have 256,000 pieces
        if isinstance(message, bytes)
        and message.endswith(ending)
        and (_TYPE, USER_DEFINED) in _fields(message)
    ]


def _settings(model: bytes, part: int) -> dict[int, int | bytes]:
    """The fields of one of the model's messages; later ones override earlier ones."""
    messages = (value for number, value in _fields(model) if number == part)
    return {
        number: value
        for message in messages
        if isinstance(message, bytes)
        for number, value in _fields(message)
    }


def field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: a varint, or length and bytes."""
    if isinstance(value, bytes):
        return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
    return _varint(number << 3 | _VARINT) + _varint(value % 2**64)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(encoded) + bytes([value])


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field."""
    at = 0
    try:
        while at < len(message):
            tag, at = _read_varint(message, at)
            kind = tag & 7
            value: int | bytes
            if kind == _VARINT:
                value, at = _read_varint(message, at)
            else:
                size = {_FIXED32: 4, _FIXED64: 8}.get(kind)
                if size is None and kind == _BYTES:
                    size, at = _read_varint(message, at)
                if size is None or at + size > len(message):
                    raise ValueError(f"not protobuf at byte {at}")
                value, at = message[at : at + size], at + size
            yield tag >> 3, value
    except IndexError:
        raise ValueError("the protobuf message is truncated") from None


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """A varint and the place after it."""
    value, shift = 0, 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
