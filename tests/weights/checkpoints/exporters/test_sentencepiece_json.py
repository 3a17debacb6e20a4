"""sentencepiece vocabularies as tokenizer.json: the same ids, or none at all."""

import pytest
from tokenizers import AddedToken

from tests.models import train_sentencepiece
from weights.checkpoints.added_tokens import ListedToken, TokenizerConfig
from weights.checkpoints.exporters.sentencepiece_json import sentencepiece_json
from weights.checkpoints.sentencepiece_proto import UNUSED, field, with_pieces
from weights.checkpoints.sentencepiece_tokenizer import SentencePieceTokenizer
from weights.checkpoints.tokenizer import JsonTokenizer

TEXT = " fox  <tool> river</s>\n<tool>naïve é🦊 <pad> foxfox"
TOOL = ListedToken(AddedToken("<tool>", lstrip=True, normalized=False), None)
PAD = ListedToken(AddedToken("<pad>", special=True), None)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> bytes:
    lines = ["the naïve fox and the river", "a foxhound by the stone river"] * 40
    return train_sentencepiece(tmp_path_factory.mktemp("spm"), lines)


@pytest.mark.parametrize(
    "config",
    [
        TokenizerConfig(),
        TokenizerConfig(add_bos=False),
        TokenizerConfig(add_eos=True),
        TokenizerConfig(add_prefix_space=False),
        TokenizerConfig(add_prefix_space=False, is_legacy=False),
        TokenizerConfig(listed=(TOOL, PAD), add_eos=True),
    ],
)
def test_settings_of_a_folder_give_the_same_ids(model, config):
    pieces = SentencePieceTokenizer(model, config)
    made = sentencepiece_json(pieces)
    assert made is not None
    tokenizer = JsonTokenizer(made)
    assert tokenizer.special_ids == pieces.special_ids
    assert (tokenizer.begin_ids, tokenizer.end_ids) == (pieces.begin_ids, pieces.end_ids)
    for text in (TEXT, "", "fox", "</s>fox"):
        ids = pieces.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == pieces.decode(ids)


@pytest.mark.parametrize(
    "config", [TokenizerConfig(is_legacy=False), TokenizerConfig(splits_special=True)]
)
def test_settings_that_the_file_cannot_express_give_none(model, config):
    assert sentencepiece_json(SentencePieceTokenizer(model, config)) is None


@pytest.mark.parametrize(
    ("part", "number", "value"),
    [(2, 3, 1), (2, 24, 1), (3, 4, 1), (3, 5, 0)],
    ids=["unigram", "suffix", "removed_spaces", "plain_spaces"],
)
def test_models_of_other_kinds_give_none(model, part, number, value):
    changed = model + field(part, field(number, value))
    assert sentencepiece_json(SentencePieceTokenizer(changed)) is None


def test_pieces_that_are_not_used_give_none(model):
    changed = with_pieces(model, {300: ("unusedpiece", UNUSED)})
    assert sentencepiece_json(SentencePieceTokenizer(changed)) is None
