"""Begin, end and added tokens of tokenizer.json and its settings, as AutoTokenizer has them."""

import itertools
import json
import random

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from tests.models import byte_tokenizer, train_sentencepiece
from weights.checkpoints.sentencepiece_tokenizer import SentencePieceTokenizer
from weights.checkpoints.tokenizer import JsonTokenizer, load_tokenizer
from weights.checkpoints.truncation import last_tokens
from weights.checkpoints.word_ids import word_ids
from weights.errors import CheckpointError

BEGIN, END = "<begin>", "<eos>"
TEMPLATES = {
    "none": None,
    "begin": f"{BEGIN} $A",
    "both": f"{BEGIN} $A {END}",
}


def save(folder, template=None, **files):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([BEGIN])
    if template is not None:
        special = [(name, tokenizer.token_to_id(name)) for name in (BEGIN, END)]
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_tokenizer_json_alone_says_whether_texts_have_begin_and_end_tokens(
    tmp_path, template, kind
):
    named = {"bos_token": BEGIN, "eos_token": END, "tokenizer_class": kind}
    for add_bos, add_eos in itertools.product((None, True, False), repeat=2):
        added = {"add_bos_token": add_bos, "add_eos_token": add_eos}
        config = named | {key: value for key, value in added.items() if value is not None}
        reference, tokenizer = save(tmp_path, TEMPLATES[template], tokenizer_config=config)
        wanted = reference("ab").input_ids
        assert tokenizer.encode("ab") == wanted
        assert [*tokenizer.begin_ids, *tokenizer.encode("ab", False), *tokenizer.end_ids] == wanted


TOOL = {"content": "<tool>", "lstrip": False, "rstrip": True, "normalized": False, "special": True}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"added_tokens": {"<tool>": 262, "<fill>": 261}},
        {"special_tokens_map": {"pad_token": "<fill>", "additional_special_tokens": ["<tool>"]}},
        {
            "special_tokens_map": {"pad_token": "<fill>"},
            "added_tokens": {"<fill>": 262, "<tool>": 261},
        },
        {
            "tokenizer_config": {"added_tokens_decoder": {"261": TOOL}},
            "added_tokens": {"<fill>": 262},
        },
        {
            "tokenizer_config": {
                "pad_token": {"__type": "AddedToken", **TOOL},
                "extra_special_tokens": ["<fill>"],
            }
        },
        {"tokenizer_config": {"extra_special_tokens": {"tool_token": "<tool>"}}},
        {"special_tokens_map": {"pad_token": "a"}},
        {"tokenizer_config": {"split_special_tokens": True}},
    ],
)
def test_tokens_beside_tokenizer_json_have_the_ids_of_autotokenizer(tmp_path, files):
    reference, tokenizer = save(tmp_path, **files)
    for text in ("a<tool>  b<fill>c", f"<tool>{END}{BEGIN}", "<tool"):
        ids = reference(text).input_ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_a_token_that_cannot_have_its_id_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    (tmp_path / "added_tokens.json").write_text('{"<tool>": 5000}')
    with pytest.raises(CheckpointError, match="'<tool>' gets the id"):
        load_tokenizer(tmp_path)


def fallback_tokenizer(folder) -> SentencePieceTokenizer:
    drawn = random.Random(1)
    lines = [" ".join(drawn.choices(["fox", "hound", "river", "und"], k=8)) for _ in range(200)]
    return SentencePieceTokenizer(train_sentencepiece(folder, lines))


def with_words() -> JsonTokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["đem", "café", "bytes:\\xff", "A"])
    return JsonTokenizer(tokenizer)


def test_every_token_has_a_name_that_no_other_has(tmp_path, smollm2):
    for tokenizer in (fallback_tokenizer(tmp_path), with_words(), load_tokenizer(smollm2)):
        ids = range(50_000)
        names = [tokenizer.token_name(i) for i in ids]
        assert len(set(names)) == len(names)
        for token_id, name in zip(ids, names, strict=True):
            if not name.startswith(("bytes:", "token_id:")):
                assert name == tokenizer.token_text(token_id)
        assert tokenizer.token_name(10**6) == "token_id:1000000"


def test_names_are_texts_or_bytes(tmp_path):
    tokenizer = fallback_tokenizer(tmp_path)
    fox, first = tokenizer.encode("fox é", add_special_tokens=False)[::2][:2]
    assert tokenizer.token_name(fox) == " fox" and tokenizer.token_name(first) == "bytes:\\xc3"
    assert tokenizer.token_name(2) == "</s>"
    plain = with_words()
    assert plain.token_name(plain.encode("é")[0]) == "bytes:\\xc3"
    for word in ("đem", "café"):
        assert plain.token_name(plain.encode(word)[0]) == plain.decode(plain.encode(word)) == word


def test_texts_of_tokens_are_what_they_add_to_a_text(tmp_path, smollm2):
    for tokenizer in (fallback_tokenizer(tmp_path), load_tokenizer(smollm2), with_words()):
        anchor = tokenizer.encode("a", add_special_tokens=False)
        for token_id in (*range(3, 400), 49_000):
            if token_id not in tokenizer.special_ids:
                text = tokenizer.decode([*anchor, token_id])
                assert tokenizer.token_text(token_id) == text[len(tokenizer.decode(anchor)) :]


def test_a_word_is_found_after_spaces_and_newlines(tmp_path, smollm2):
    for tokenizer in (fallback_tokenizer(tmp_path), load_tokenizer(smollm2)):
        ways = word_ids(tokenizer, "fox")
        for text in ("fox", "a fox", "a\nfox", "a\n\nfox", "1 fox", "(fox)", "a\n fox"):
            ids = tokenizer.encode(text)
            assert any(
                tuple(ids[start : start + len(way)]) == way
                for way in ways
                for start in range(len(ids))
            )
        assert len(set(ways)) == len(ways) and all(ways)


def test_truncation_keeps_begin_and_end_tokens(tmp_path):
    _, tokenizer = save(tmp_path, TEMPLATES["both"])
    ids = tokenizer.encode("abcdef")
    assert last_tokens(tokenizer, ids, 100) == last_tokens(tokenizer, ids, 8) == ids
    assert last_tokens(tokenizer, ids, 4) == [ids[0], *ids[5:]]
    assert last_tokens(tokenizer, ids, 2) == [ids[0], ids[-1]]
    assert last_tokens(tokenizer, ids, 1) == [ids[0]]
    plain = JsonTokenizer(byte_tokenizer())
    assert last_tokens(plain, plain.encode("abc"), 2) == plain.encode("bc")
