"""Writes a sentencepiece vocabulary as ``tokenizer.json``, if that gives the same ids."""

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from weights.checkpoints import sentencepiece_proto as proto
from weights.checkpoints.sentencepiece_tokenizer import SPACE, SentencePieceTokenizer


def sentencepiece_json(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer | None:
    """The same tokenizer for the tokenizers library, in the form of Llama 2's ``tokenizer.json``.

    None if its ids could differ: the vocabulary is not a BPE of plain text, or a space is added
    before the first part of a text only, or the names of special tokens are plain text.
    """
    processor, added = tokenizer.processor, tokenizer.added
    model, rest = (one.serialized_model_proto() for one in (processor, tokenizer.rest_processor))
    has_prefix = proto.adds_prefix(model)
    if not proto.is_plain_bpe(model) or has_prefix != proto.adds_prefix(rest):
        return None
    if not tokenizer.special_ids <= added.keys():
        return None
    names = [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]
    vocabulary = {name: i for i, name in enumerate(names)}
    normal = {name: i for name, i in vocabulary.items() if i not in added}
    if any(processor.IsUnused(i) for i in normal.values()):
        return None
    scored = sorted(normal, key=lambda name: -processor.GetScore(normal[name]))
    merges = [
        (name[:at], name[at:])
        for name in scored
        if not processor.IsByte(normal[name])
        for at in range(1, len(name))
        if name[:at] in normal and name[at:] in normal
    ]
    unknown = names[processor.unk_id()]
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown)
    )
    prefix = [normalizers.Prepend(SPACE)] if has_prefix else []
    made.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, *strip])
    made.add_tokens([_flagged(added[i], i in tokenizer.special_ids) for i in sorted(added)])
    _add_ends(made, tokenizer, names)
    return made


def _flagged(token: AddedToken, is_special: bool) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=is_special,
    )


def _add_ends(
    made: tokenizers.Tokenizer, tokenizer: SentencePieceTokenizer, names: list[str]
) -> None:
    """Make ``made`` add the special tokens before and after a text."""
    begin, end = ([names[i] for i in ids] for ids in (tokenizer.begin_ids, tokenizer.end_ids))
    if begin or end:
        ids = {names[i]: i for i in (*tokenizer.begin_ids, *tokenizer.end_ids)}
        made.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end], special_tokens=list(ids.items())
        )
