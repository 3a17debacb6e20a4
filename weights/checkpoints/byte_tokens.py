"""Tokens that stand for bytes: byte fallback, and the characters of byte-level vocabularies."""

from collections.abc import Mapping

BYTE_NAMES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# ByteLevel's characters for bytes: printable bytes stay, the others start at U+0100
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(sorted(set(range(256)) - set(_PRINTABLE)))
# characters to the Latin-1 character of their byte; those that stand for no byte leave Latin-1
_LATIN_1: Mapping[int, int] = dict.fromkeys(_OTHERS, 256) | {
    0x100 + place: byte for place, byte in enumerate(_OTHERS)
}


def byte_tokens(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """Tokens that stand for one byte each (byte fallback)."""
    return {vocabulary[n]: bytes([i]) for i, n in enumerate(BYTE_NAMES) if n in vocabulary}


def byte_level(name: str) -> bytes:
    """The bytes of a byte-level token; a name with other characters stands for itself."""
    try:
        return name.translate(_LATIN_1).encode("latin-1")
    except UnicodeEncodeError:
        return name.encode()
