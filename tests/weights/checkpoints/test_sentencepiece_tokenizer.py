"""sentencepiece vocabularies: the ids of the same vocabulary as tokenizer.json, added tokens."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models import train_sentencepiece
from weights.checkpoints import sentencepiece_proto
from weights.checkpoints.exporters.sentencepiece_json import sentencepiece_json
from weights.checkpoints.sentencepiece_tokenizer import SentencePieceTokenizer
from weights.checkpoints.tokenizer import JsonTokenizer, load_tokenizer
from weights.errors import CheckpointError

WORDS = ["fox", "hound", "river", "stone", "light", "naïve", "und", "der"]
PARTS = ["fox", " river", "</s>", "<s>", "<unk>", "[INST]", " ", "\n", "é🦊", "<0x41>", "<tool>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> bytes:
    drawn = random.Random(1)
    lines = [" ".join(drawn.choices(WORDS, k=8)) for _ in range(200)]
    folder = tmp_path_factory.mktemp("spm")
    return train_sentencepiece(folder, lines, user_defined_symbols=["[INST]"])


@pytest.fixture(scope="module")
def pair(model):
    pieces = SentencePieceTokenizer(model)
    made = sentencepiece_json(pieces)
    assert made is not None
    return pieces, JsonTokenizer(made)


@given(st.lists(st.sampled_from(PARTS), max_size=8))
def test_ids_are_those_of_the_same_vocabulary_as_tokenizer_json(pair, parts):
    pieces, reference = pair
    ids = pieces.encode("".join(parts))
    assert ids == reference.encode("".join(parts))
    assert pieces.special_ids == reference.special_ids
    assert pieces.decode(ids) == reference.decode(ids)


def folder_of(tmp_path, model, **files):
    (tmp_path / "tokenizer.model").write_bytes(model)
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return load_tokenizer(tmp_path)


def test_turns_of_a_chat_have_their_begin_and_end_tokens(tmp_path, model):
    tokenizer = folder_of(tmp_path, model, tokenizer_config={"add_eos_token": True})
    assert (tokenizer.begin_ids, tokenizer.end_ids) == ((1,), (2,))
    ids = tokenizer.encode("fox</s><s>[INST]fox")
    assert [i for i in ids if i < 4] == [1, 2, 1, 3, 2]
    assert tokenizer.encode("fox</s>", add_special_tokens=False)[-1] == 2
    assert tokenizer.decode(ids) == "fox[INST] fox"


@pytest.mark.parametrize(
    ("config", "second", "third"),
    [({}, " fox", " fox"), ({"legacy": True}, " fox", " fox"), ({"legacy": False}, " fox", "fox")],
)
def test_a_space_is_added_to_the_text_or_to_each_part(tmp_path, model, config, second, third):
    tokenizer = folder_of(tmp_path, model, tokenizer_config=config)
    texts = [tokenizer.token_text(i) for i in tokenizer.encode("fox</s>fox")]
    assert texts == ["<s>", second, "</s>", third]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | {"add_prefix_space": False})
    )
    without = load_tokenizer(tmp_path)
    texts = [without.token_text(i) for i in without.encode("fox</s> fox")]
    assert texts == ["<s>", "fox", "</s>", " fox"]
    assert without.decode(without.encode(" fox")) == " fox"


def test_added_tokens_are_found_and_shown(tmp_path, model):
    size = len(SentencePieceTokenizer(model)._names)
    tokenizer = folder_of(
        tmp_path,
        model,
        added_tokens={"<tool>": size + 1, "<|end|>": size},
        special_tokens_map={"pad_token": "<pad>", "additional_special_tokens": ["<|end|>", "fox"]},
    )
    ids = tokenizer.encode(" river<tool> light<|end|><pad>fox", add_special_tokens=False)
    fox = tokenizer.encode("fox", add_special_tokens=False)
    assert [i for i in ids if i >= size] == [size + 1, size, size + 2] and ids[-1:] == fox
    assert tokenizer.special_ids >= {size, size + 2, *fox}
    assert tokenizer.decode(ids).endswith("river<tool>  light")
    assert tokenizer.token_text(size + 1) == "<tool>" and tokenizer.token_text(size) == "<|end|>"


def test_the_decoder_of_added_tokens_may_strip_spaces_and_rename_pieces(tmp_path, model):
    listed = {
        "3": {"content": "[CALL]", "special": True, "rstrip": True},
        "0": {"content": "<unk>", "special": True},
    }
    config = {"added_tokens_decoder": listed, "bos_token": "[CALL]"}
    # the decoder stands for the other files
    tokenizer = folder_of(tmp_path, model, tokenizer_config=config, added_tokens={"<x>": 9999})
    texts = [tokenizer.token_text(i) for i in tokenizer.encode("fox[CALL]  fox[INST]")]
    assert texts[:4] == ["[CALL]", " fox", "[CALL]", " fox"] and "[INST]" not in texts
    config["split_special_tokens"] = True
    split = folder_of(tmp_path, model, tokenizer_config=config).encode("</s>", False)
    assert 2 not in split and len(split) > 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<x>": 9999}}, "no token has the id"),
        ({"added_tokens": {"<x>": -1}}, "-1 is not from 0"),
        ({"added_tokens": {"<x>": "7"}}, "expected int"),
        ({"added_tokens": {"fox": 9}}, "'fox' has the id"),
        ({"added_tokens": ["<x>"]}, "added_tokens.json: expected a JSON object"),
        ({"special_tokens_map": {"pad_token": 3}}, "special_tokens_map.json: pad_token"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "x: is not a token id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": {}}}}, "1.content: expected str"),
        ({"tokenizer_config": {"add_bos_token": "no"}}, "tokenizer_config.json: add_bos_token"),
        ({"tokenizer_config": {"bos_token": ""}}, "bos_token: is empty"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, model, files, message):
    with pytest.raises(CheckpointError, match=message):
        folder_of(tmp_path, model, **files)


def test_a_vocabulary_without_begin_token_adds_none(tmp_path, tmp_path_factory):
    lines = [" ".join(WORDS)] * 50
    model = train_sentencepiece(tmp_path_factory.mktemp("spm"), lines, bos_id=-1, eos_id=1)
    tokenizer = folder_of(tmp_path, model)
    assert tokenizer.begin_ids == () and min(tokenizer.encode("fox")) >= 0
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<s>"}')
    assert min(load_tokenizer(tmp_path).encode("fox")) >= 0


@given(st.binary(max_size=40))
def test_bytes_that_are_no_protobuf_are_refused(data):
    try:
        sentencepiece_proto.user_defined_ids(data)
    except ValueError as error:
        assert "protobuf" in str(error)
