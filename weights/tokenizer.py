"""Text to token ids and back, behind one interface; needs no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from weights.errors import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class Tokenizer(Protocol):
    """A model's own tokenizer. Ids it does not know decode to nothing."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens, which are no text: begin and end of sequence and the like."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``, with what the model expects around it (often a begin token)."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        ...


class JsonTokenizer:
    """A ``tokenizer.json``, run by the tokenizers library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


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
        self.special_ids = frozenset(filter(self._processor.IsControl, range(self._num_pieces)))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._processor.EncodeAsIds(text)
        return (self._bos_ids if add_special_tokens else []) + ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.DecodeIds([i for i in ids if 0 <= i < self._num_pieces])
        return text


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


def _adds_bos(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return True
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("add_bos_token", True))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a JSON object ({error})") from None
