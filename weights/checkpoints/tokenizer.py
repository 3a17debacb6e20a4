"""Tokenizers behind one protocol: text to token ids and back. Needs no torch."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from weights.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


_BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]
# ByteLevel's characters for bytes: printable bytes stay, the others start at U+0100
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + place): byte for place, byte in enumerate(_OTHERS)
}


class Tokenizer(Protocol):
    """The tokenizer of a model. Unknown ids decode to empty text."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which have no text: begin and end of sequence, for example."""
        ...

    @property
    def longest_token(self) -> int:
        """Largest number of characters that one token covers."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``, by default with the model's special tokens (often a begin token)."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """UTF-8 bytes that a token that is not special adds to any text.

        None if they depend on the text: some tokens lose their space at the start of a text.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens; invalid UTF-8 becomes U+FFFD."""
        ...

    def token_text(self, token_id: int) -> str:
        """Text of one token, with its leading space; the name of a special token."""
        ...


class JsonTokenizer:
    """A ``tokenizer.json``, run by the tokenizers library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        vocabulary = tokenizer.get_vocab()
        self.longest_token = max(map(len, vocabulary))
        self._token_bytes: Callable[[int], bytes | None] = lambda token_id: None
        if isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel):
            self._token_bytes = cache(partial(_byte_level, tokenizer))
        # such names are byte tokens only if the decoder treats them as bytes
        elif self.decode([vocabulary.get(_BYTE_NAMES[0x41], -1)]) == "A":
            self._token_bytes = _byte_tokens(vocabulary).get

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # encode_batch releases the GIL, encode does not
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def token_bytes(self, token_id: int) -> bytes | None:
        return self._token_bytes(token_id)

    def decode(self, ids: Sequence[int]) -> str:
        known = [token_id for token_id in ids if token_id >= 0]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        if token_id in self.special_ids:
            return str(self._tokenizer.id_to_token(token_id))
        return _text_after(self, token_id)


class SentencePieceTokenizer:
    """A ``tokenizer.model``, run by the sentencepiece library."""

    def __init__(self, model: bytes, add_bos: bool = True) -> None:
        """Load a serialised model; ``add_bos`` adds its begin token to every text.

        Raises:
            RuntimeError: the bytes are not a sentencepiece model.
        """
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        self._bos_ids = [self._processor.bos_id()] if add_bos else []
        self._num_pieces = self._processor.GetPieceSize()
        pieces = range(self._num_pieces)
        self.special_ids = frozenset(filter(self._processor.IsControl, pieces))
        names = {self._processor.IdToPiece(i): i for i in pieces}
        self.longest_token = max(map(len, names))
        byte_names = {name: i for name, i in names.items() if self._processor.IsByte(i)}
        self._byte_tokens = _byte_tokens(byte_names)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._processor.EncodeAsIds(text)
        return (self._bos_ids if add_special_tokens else []) + ids

    def token_bytes(self, token_id: int) -> bytes | None:
        return self._byte_tokens.get(token_id)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.DecodeIds([i for i in ids if 0 <= i < self._num_pieces])
        return text

    def token_text(self, token_id: int) -> str:
        if token_id in self.special_ids:
            return str(self._processor.IdToPiece(token_id))
        return _text_after(self, token_id)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's ``tokenizer.json``, or else its ``tokenizer.model``.

    Raises:
        CheckpointError: neither file exists, or it cannot be read.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            return JsonTokenizer(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path}: {error}") from None
    path = folder / "tokenizer.model"
    if not path.exists():
        raise CheckpointError(f"{folder}: has neither tokenizer.json nor tokenizer.model")
    try:
        return SentencePieceTokenizer(path.read_bytes(), _adds_bos(folder))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: not a sentencepiece model ({error})") from None


def _byte_tokens(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """Tokens that stand for one byte each (byte fallback)."""
    return {vocabulary[n]: bytes([i]) for i, n in enumerate(_BYTE_NAMES) if n in vocabulary}


def _byte_level(tokenizer: tokenizers.Tokenizer, token_id: int) -> bytes:
    name = tokenizer.id_to_token(token_id) if token_id >= 0 else None
    if name is None:
        return b""
    if _BYTE_OF.keys() >= set(name):
        return bytes(_BYTE_OF[character] for character in name)
    return str(name).encode()  # an added token


def _text_after(tokenizer: Tokenizer, token_id: int) -> str:
    # decode after some text, because many tokenizers drop the space of the first token
    anchor = tokenizer.encode("a", add_special_tokens=False)
    return tokenizer.decode([*anchor, token_id])[len(tokenizer.decode(anchor)) :]


def _adds_bos(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return True
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("add_bos_token", True))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a JSON object ({error})") from None
