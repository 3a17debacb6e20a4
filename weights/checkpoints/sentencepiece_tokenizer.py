"""A sentencepiece vocabulary (``tokenizer.model``) with the added tokens of its folder."""

from collections.abc import Sequence

import sentencepiece
from tokenizers import AddedToken

from weights.checkpoints import sentencepiece_proto as proto
from weights.checkpoints.added_tokens import ListedToken, TokenizerConfig
from weights.checkpoints.byte_tokens import byte_tokens
from weights.checkpoints.token_splitter import TokenSplitter
from weights.checkpoints.token_table import TokenTable

SPACE = "\u2581"


class SentencePieceTokenizer:
    """A ``tokenizer.model``, run by the sentencepiece library.

    As in Hugging Face's and llama.cpp's code, the names of control, unknown, user-defined and added
    tokens are found first. The library gets the parts of the text between them.

    Attributes:
        processor: the library's tokenizer of the first part of a text.
        rest_processor: that of the parts after the first token, which may add no space.
        added: the tokens whose names are found first, by id.
        largest_id: largest id that ``encode`` gives for texts without names of special tokens.
    """

    def __init__(self, model: bytes, config: TokenizerConfig | None = None) -> None:
        """Load a serialised model; by default a text begins with its begin token, if it has one.

        Raises:
            RuntimeError: the bytes are not a sentencepiece model.
            ValueError: an added token cannot have its id.
        """
        config = config or TokenizerConfig()
        processor = _processor(model)
        names = _names(processor)
        listed = _with_ids(config.listed, names)
        changed = {
            i: (token.content, proto.CONTROL if token.special else proto.UNUSED)
            for i, token in listed.items()
            if i >= len(names) or names[i] != token.content
        }
        if changed:
            model = proto.with_pieces(model, changed)
            processor = _processor(model)
        # a legacy tokenizer adds a space to each part
        self.processor = self.rest_processor = processor
        if config.add_prefix_space is False or not config.is_legacy:
            self.rest_processor = _processor(proto.without_prefix(model))
        if config.add_prefix_space is False:
            self.processor = self.rest_processor
        self._names = _names(processor)
        ids = range(len(self._names))
        own_special = {i for i in ids if processor.IsControl(i) or processor.IsUnknown(i)}
        self.special_ids = frozenset(own_special | {i for i, one in listed.items() if one.special})
        self.longest_token = max(map(len, self._names))
        known = {name: i for i, name in enumerate(self._names)}
        bos = known.get(config.bos or "", processor.bos_id())
        self.begin_ids = (bos,) if bos >= 0 and config.add_bos is not False else ()
        eos = known.get(config.eos or "", processor.eos_id())
        self.end_ids = (eos,) if eos >= 0 and config.add_eos else ()
        named = {i for i, one in listed.items() if one.special}
        self.largest_id = max((*(i for i in ids if i not in named), *self.begin_ids, *self.end_ids))
        matched = own_special.union(proto.user_defined_ids(model)).difference(listed)
        tokens = listed | {i: AddedToken(self._names[i], normalized=False) for i in matched}
        if config.splits_special:
            tokens = {i: token for i, token in tokens.items() if i not in self.special_ids}
        self.added = tokens
        self._splitter = TokenSplitter(tokens)
        self._byte_tokens = byte_tokens({self._names[i]: i for i in ids if processor.IsByte(i)})
        self._table = TokenTable(self._texts, self.token_bytes, self._byte_tokens)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = []
        for part in self._splitter.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                processor = self.rest_processor if ids else self.processor
                ids += processor.EncodeAsIds(part)
        return [*self.begin_ids, *ids, *self.end_ids] if add_special_tokens else ids

    def token_bytes(self, token_id: int) -> bytes | None:
        return self._byte_tokens.get(token_id)

    def decode(self, ids: Sequence[int]) -> str:
        known = range(len(self._names))
        text: str = self.processor.DecodeIds(
            [i for i in ids if i in known and i not in self.special_ids]
        )
        return text

    def token_text(self, token_id: int) -> str:
        return self._table.text(token_id)

    def token_name(self, token_id: int) -> str:
        return self._table.name(token_id)

    def _texts(self) -> dict[int, str]:
        texts = {i: name.replace(SPACE, " ") for i, name in enumerate(self._names)}
        texts |= {i: data.decode(errors="replace") for i, data in self._byte_tokens.items()}
        return texts | {i: self._names[i] for i in self.special_ids}


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def _names(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    return [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]


def _with_ids(listed: Sequence[ListedToken], names: Sequence[str]) -> dict[int, AddedToken]:
    """The listed tokens by id; a name without an id has that of its piece, or the next free id."""
    known = {name: i for i, name in enumerate(names)}
    tokens: dict[int, AddedToken] = {}
    num_ids = len(names)
    for token, token_id in listed:
        found = known.get(token.content, num_ids if token_id is None else token_id)
        if token_id is not None and found != token_id:
            raise ValueError(f"{token.content!r} has the id {found}, but is listed with {token_id}")
        if found > num_ids:
            raise ValueError(f"{token.content!r}: no token has the id {num_ids} before {found}")
        known[token.content] = found
        tokens[found] = token
        num_ids = max(num_ids, found + 1)
    return tokens
