"""Converts the tokenizer of a GGUF file to tokenizer.json or tokenizer.model."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from weights.errors import CheckpointError

# token types of llama.cpp and sentencepiece
_CONTROL, _USER_DEFINED = 3, 4
_BPE = 2  # sentencepiece's TrainerSpec.ModelType

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class GgufTokenizer:
    """Tokenizer metadata of a GGUF file; fields are named after its keys."""

    model: str
    pre: str
    tokens: Sequence[str]
    token_types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    bos_id: int | None
    unknown_id: int | None
    add_bos: bool
    add_space_prefix: bool
    chat_template: str | None


def tokenizer_files(source: GgufTokenizer) -> dict[str, bytes]:
    """Content of the tokenizer files, by name.

    Raises:
        CheckpointError: the tokenizer model or the pre-tokenizer is not supported; a guess would
            silently produce wrong ids.
    """
    config: dict[str, Any] = {"add_bos_token": source.add_bos}
    if source.chat_template is not None:
        config["chat_template"] = source.chat_template
    files = {"tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}
    if source.model == "gpt2":
        files["tokenizer.json"] = _byte_level_bpe(source).to_str().encode()
    elif source.model == "llama":
        files["tokenizer.model"] = _sentencepiece_model(source)
    else:
        raise CheckpointError(f"tokenizer.ggml.model: {source.model!r} is not one of gpt2, llama")
    return files


def _byte_level_bpe(source: GgufTokenizer) -> tokenizers.Tokenizer:
    vocabulary = {token: index for index, token in enumerate(source.tokens)}
    merges = [_split_merge(merge) for merge in source.merges]
    # Llama 3 does not apply merges to a word that is a token
    ignore_merges = source.pre == "llama-bpe"
    try:
        bpe = models.BPE(vocabulary, merges, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"tokenizer.ggml.merges: {error}") from None
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = _pre_tokenizer(source.pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(source, _CONTROL))
    tokenizer.add_tokens(_added(source, _USER_DEFINED))
    if source.add_bos and source.bos_id is not None:
        bos = source.tokens[source.bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, source.bos_id)]
        )
    return tokenizer


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name == "llama-bpe":
        split = pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, plain])
    raise CheckpointError(f"tokenizer.ggml.pre: {name!r} is not one of gpt-2, llama-bpe, smollm")


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _added(source: GgufTokenizer, token_type: int) -> list[AddedToken]:
    special = token_type == _CONTROL
    return [
        AddedToken(token, special=special, normalized=False)
        for token, found in zip(source.tokens, source.token_types, strict=True)
        if found == token_type
    ]


def _sentencepiece_model(source: GgufTokenizer) -> bytes:
    """The pieces as a serialised ``sentencepiece.ModelProto``."""
    pieces = zip(source.tokens, source.scores, source.token_types, strict=True)
    model = b"".join(
        _field(1, _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind))
        for piece, score, kind in pieces
    )
    ids: Mapping[int, int | None] = {40: source.unknown_id, 41: source.bos_id}
    trainer = _field(3, _BPE) + _field(35, 1)  # model_type, byte_fallback
    for number, value in ids.items():
        trainer += _field(number, value if value is not None else -1)
    # name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = _field(1, b"identity") + _field(3, int(source.add_space_prefix))
    normalizer += _field(4, 0) + _field(5, 1)
    return model + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: a varint, or length and bytes."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value % 2**64)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(encoded) + bytes([value])
