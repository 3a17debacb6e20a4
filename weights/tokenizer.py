"""Text to token ids and back, behind one interface; needs no torch."""

import json
from collections.abc import Mapping, Sequence
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


class Tokenizer(Protocol):
    """A model's own tokenizer. Ids it does not know decode to nothing."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens, which are no text: begin and end of sequence and the like."""
        ...

    @property
    def byte_tokens(self) -> Mapping[int, int]:
        """Tokens that stand for one byte each (byte fallback), and which."""
        ...

    @property
    def longest_token(self) -> int:
        """Characters that one token covers at most."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``, with what the model expects around it (often a begin token)."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token by itself, its space included; a special one by its name."""
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
        self.byte_tokens: dict[int, int] = {}
        # names alone do not make byte tokens, the decoder must treat them so
        if self.decode([vocabulary.get(_BYTE_NAMES[0x41], -1)]) == "A":
            self.byte_tokens = {vocabulary[name]: i for i, name in enumerate(_BYTE_NAMES)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # of these two calls only this one lets other threads run meanwhile
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

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
        """Load a serialised model; ``add_bos`` puts its begin token before every text.

        Raises:
            RuntimeError: these bytes are no sentencepiece model.
        """
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        self._bos_ids = [self._processor.bos_id()] if add_bos else []
        self._num_pieces = self._processor.GetPieceSize()
        pieces = range(self._num_pieces)
        self.special_ids = frozenset(filter(self._processor.IsControl, pieces))
        names = {self._processor.IdToPiece(i): i for i in pieces}
        self.longest_token = max(map(len, names))
        self.byte_tokens = {
            names[name]: byte
            for byte, name in enumerate(_BYTE_NAMES)
            if name in names and self._processor.IsByte(names[name])
        }

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._processor.EncodeAsIds(text)
        return (self._bos_ids if add_special_tokens else []) + ids

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
        CheckpointError: neither is there, or it cannot be read.
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


def _text_after(tokenizer: Tokenizer, token_id: int) -> str:
    # after some text, since many tokenizers drop the space of a first token
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
