"""Tokenizers behind one protocol: text to token ids and back. Needs no torch."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import tokenizers

from weights.checkpoints.added_tokens import ListedToken, read_tokenizer_config
from weights.checkpoints.byte_tokens import BYTE_NAMES, byte_level, byte_tokens
from weights.checkpoints.sentencepiece_tokenizer import SentencePieceTokenizer
from weights.checkpoints.token_table import TokenTable
from weights.errors import CheckpointError
from weights.text_files import ENCODING, read_json_object, regular_file_bytes

# the largest vocabularies take a quarter
_MAX_BYTES = 2**27
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class Tokenizer(Protocol):
    """The tokenizer of a model. Unknown ids decode to empty text.

    ``encode`` finds the names of special and added tokens in a text, as Hugging Face's code does.
    """

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which have no text: begin and end of sequence, for example."""
        ...

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The special tokens that ``encode`` adds before a text; empty if it adds none."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The special tokens that ``encode`` adds after a text; empty if it adds none."""
        ...

    @property
    def longest_token(self) -> int:
        """Largest number of characters that one token covers."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``, by default between ``begin_ids`` and ``end_ids``."""
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

    def token_name(self, token_id: int) -> str:
        r"""A name that no other token has, by which clients tell tokens apart.

        The name is the token's text. If the token is only a part of a character, or if another
        token has the same text, the name shows its bytes (``bytes:\xe2\x96``). If the bytes are
        unknown, or are another token's name, the name shows the id (``token_id:7``).
        """
        ...


class JsonTokenizer:
    """A ``tokenizer.json``, run by the tokenizers library.

    Attributes:
        largest_id: largest id that ``encode`` gives for texts without names of special tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.longest_token = max(map(len, self._vocabulary))
        self._is_byte_level = isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel)
        # such names are byte tokens only if the decoder treats them as bytes
        is_fallback = tokenizer.decode([self._vocabulary.get(BYTE_NAMES[0x41], 0)]) == "A"
        byte_ids = byte_tokens(self._vocabulary) if is_fallback else {}
        self._token_bytes = cache(self._byte_level) if self._is_byte_level else byte_ids.get
        self._table = TokenTable(self._texts, self._token_bytes, byte_ids)
        self.begin_ids, self.end_ids = _special_ends(tokenizer.encode("a"))
        own = tokenizer.get_vocab(with_added_tokens=False).values()
        plain = self._added.keys() - self.special_ids
        self.largest_id = max((*own, *plain, *self.begin_ids, *self.end_ids))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # encode_batch releases the GIL, encode does not
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def token_bytes(self, token_id: int) -> bytes | None:
        return self._token_bytes(token_id)

    def decode(self, ids: Sequence[int]) -> str:
        if self._is_byte_level:
            data = (self._token_bytes(i) or b"" for i in ids if i not in self.special_ids)
            return b"".join(data).decode(errors="replace")
        known = [token_id for token_id in ids if token_id >= 0]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        return self._table.text(token_id)

    def token_name(self, token_id: int) -> str:
        return self._table.name(token_id)

    def _byte_level(self, token_id: int) -> bytes:
        # the library takes some letters of added tokens for characters that stand for bytes
        if token_id in self._added:
            return self._added[token_id].encode()
        name = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        return byte_level(name) if name is not None else b""

    def _texts(self) -> dict[int, str]:
        special = {i: name for i, name in self._added.items() if i in self.special_ids}
        if self._is_byte_level:
            data = {i: byte_level(name) for name, i in self._vocabulary.items()}
            return {i: one.decode(errors="replace") for i, one in data.items()} | self._added
        # decode after some text, because many tokenizers drop the space of the first token
        anchor = self.encode("a", add_special_tokens=False)
        start = len(self.decode(anchor))
        ids = list(self._vocabulary.values())
        texts = self._tokenizer.decode_batch([[*anchor, i] for i in ids])
        return {i: text[start:] for i, text in zip(ids, texts, strict=True)} | special


def _special_ends(encoding: tokenizers.Encoding) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that were added before and after a text."""
    is_special = encoding.special_tokens_mask
    start = [*is_special, 0].index(0)
    end = len(is_special) - [*reversed(is_special[start:]), 0].index(0)
    return tuple(encoding.ids[:start]), tuple(encoding.ids[end:])


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's ``tokenizer.json``, or else its ``tokenizer.model``, with its added tokens.

    Whether ``tokenizer.json`` adds a begin or an end token is its own affair, as for
    ``AutoTokenizer``: add_bos_token and add_eos_token of tokenizer_config.json are for
    ``tokenizer.model``.

    Names of special tokens may have ids beyond the vocabulary of the folder's model, because some
    folders list a padding token that their model lacks. A text that has such a name is refused
    where it is used.

    Raises:
        CheckpointError: neither file exists, a file cannot be read, or other texts have tokens
            beyond the model's vocabulary.
    """
    tokenizer = _read_tokenizer(folder)
    file = folder / "config.json"
    size = read_json_object(file).get("vocab_size") if file.exists() else None
    if isinstance(size, int) and tokenizer.largest_id >= size:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {tokenizer.largest_id}, but vocab_size in"
            f" config.json is {size}; they are not of the same model"
        )
    return tokenizer


def _read_tokenizer(folder: Path) -> JsonTokenizer | SentencePieceTokenizer:
    """The tokenizer in a folder's files (CheckpointError)."""
    config = read_tokenizer_config(folder)
    path = folder / "tokenizer.json"
    if path.exists():
        regular_file_bytes(path, _MAX_BYTES)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding=ENCODING))
            tokenizer.encode_special_tokens = config.splits_special
            _add_tokens(tokenizer, config.listed)
            return JsonTokenizer(tokenizer)
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path}: {error}") from None
    path = folder / "tokenizer.model"
    if not path.exists():
        raise CheckpointError(f"{folder}: has neither tokenizer.json nor tokenizer.model")
    regular_file_bytes(path, _MAX_BYTES)
    try:
        return SentencePieceTokenizer(path.read_bytes(), config)
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: not a sentencepiece model ({error})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _add_tokens(tokenizer: tokenizers.Tokenizer, listed: Sequence[ListedToken]) -> None:
    """Add the tokens that tokenizer.json has not added itself."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    new = [one for one in listed if one.token.content not in added]
    unknown = [one for one in new if tokenizer.token_to_id(one.token.content) is None]
    tokenizer.add_tokens([one.token for one in new])
    for token, token_id in unknown:
        found = tokenizer.token_to_id(token.content)
        if token_id is not None and found != token_id:
            raise ValueError(
                f"{token.content!r} gets the id {found}, but is listed with {token_id}"
            )
