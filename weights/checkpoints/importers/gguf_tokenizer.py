"""Converts the tokenizer of a GGUF file to tokenizer.json or tokenizer.model."""

import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from weights.checkpoints.sentencepiece_proto import BPE, BYTE, CONTROL, NORMAL, USER_DEFINED, field
from weights.checkpoints.sentencepiece_tokenizer import SentencePieceTokenizer
from weights.errors import CheckpointError

# words of Llama 3 and Qwen 2, which differ in the digits that are together
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"llama-bpe": "{1,3}", "qwen2": ""}


@dataclass(frozen=True)
class GgufTokenizer:
    """Tokenizer metadata of a GGUF file; fields are named after its keys.

    ``scores`` are those of a ``llama`` tokenizer, ``merges`` those of a ``gpt2`` tokenizer.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    token_types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None


def tokenizer_files(source: GgufTokenizer) -> dict[str, bytes]:
    """Content of the tokenizer files, by name.

    Raises:
        CheckpointError: the tokenizer model or the pre-tokenizer is not supported, or the metadata
            are not a whole tokenizer; a guess would silently produce wrong ids.
    """
    _check_tokens(source)
    config: dict[str, Any] = {"add_bos_token": source.add_bos, "add_eos_token": source.add_eos}
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
    if source.pre == "qwen2":
        # as in Qwen's own tokenizer.json; a GGUF file does not say it
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(source.pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(source, CONTROL))
    tokenizer.add_tokens(_added(source, USER_DEFINED))
    begin = _special(source, source.bos_id if source.add_bos else None)
    end = _special(source, source.eos_id if source.add_eos else None)
    if begin or end:
        names = [name for name, _ in begin], [name for name, _ in end]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*names[0], "$A", *names[1]], special_tokens=list(dict.fromkeys(begin + end))
        )
    return tokenizer


def _special(source: GgufTokenizer, token_id: int | None) -> list[tuple[str, int]]:
    """The name and the id of a token, if there is one."""
    return [] if token_id is None else [(source.tokens[token_id], token_id)]


def _check_tokens(source: GgufTokenizer) -> None:
    """Check that each token has one name, one type and one score."""
    prefix, count = "tokenizer.ggml.", len(source.tokens)
    for name, values in {"token_type": source.token_types, "scores": source.scores}.items():
        if len(values) != count and not (name == "scores" and source.model == "gpt2"):
            raise CheckpointError(f"{prefix}{name}: has {len(values)} entries for {count} tokens")
    unknown = set(source.token_types) - set(range(NORMAL, BYTE + 1))
    if unknown:
        raise CheckpointError(f"{prefix}token_type: {min(unknown)} is not a type of tokens")
    name, uses = Counter(source.tokens).most_common(1)[0]
    if uses > 1:
        raise CheckpointError(f"{prefix}tokens: {name!r} is the name of {uses} tokens")


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name in _DIGITS:
        split = pre_tokenizers.Split(Regex(_WORDS % _DIGITS[name]), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, plain])
    supported = ", ".join(("gpt-2", *_DIGITS, "smollm"))
    raise CheckpointError(f"tokenizer.ggml.pre: {name!r} is not one of {supported}")


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _added(source: GgufTokenizer, token_type: int) -> list[AddedToken]:
    special = token_type == CONTROL
    return [
        AddedToken(token, special=special, normalized=False)
        for token, found in zip(source.tokens, source.token_types, strict=True)
        if found == token_type
    ]


def _sentencepiece_model(source: GgufTokenizer) -> bytes:
    """The pieces as a serialised ``sentencepiece.ModelProto``."""
    pieces = zip(source.tokens, source.scores, source.token_types, strict=True)
    model = b"".join(
        field(1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + field(3, kind))
        for piece, score, kind in pieces
    )
    ids: Mapping[int, int | None] = {40: source.unknown_id, 41: source.bos_id, 42: source.eos_id}
    # model_type, byte_fallback
    trainer = field(3, BPE) + field(35, int(BYTE in source.token_types))
    for number, value in ids.items():
        trainer += field(number, value if value is not None else -1)
    # name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = field(1, b"identity") + field(3, int(source.add_space_prefix))
    normalizer += field(4, 0) + field(5, 1)
    model += field(2, trainer) + field(3, normalizer)
    try:
        SentencePieceTokenizer(model)
    except RuntimeError as error:
        raise CheckpointError(f"tokenizer.ggml.tokens: not a whole vocabulary ({error})") from None
    return model
