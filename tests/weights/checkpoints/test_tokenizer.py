"""Tokenizers of checkpoint folders, and streaming of decoded text."""

import json
import random

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers

from tests.models import byte_tokenizer, train_sentencepiece
from weights.checkpoints.detokenizer import IncrementalDetokenizer
from weights.checkpoints.sentencepiece_tokenizer import SentencePieceTokenizer
from weights.checkpoints.tokenizer import JsonTokenizer, load_tokenizer
from weights.errors import CheckpointError

BYTES = JsonTokenizer(byte_tokenizer())
TEXTS = [
    "In 2024, 1234567 of 3.14 %",
    "def f(x):\n    return {'a': [x]*2}  # ok\n\n\tend",
    "日本語の文章。中文句子。한국어",
    "👩‍👩‍👧‍👦 and 🦊🇨🇭",
    "   leading and  double   spaces ",
    "naïve café — “quotes”…",
    " a",
]


def wrapped_tokenizer() -> JsonTokenizer:
    """The byte tokenizer with a decoder that hides the bytes of a token."""
    tokenizer = byte_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    return JsonTokenizer(tokenizer)


WRAPPED = wrapped_tokenizer()
both = pytest.mark.parametrize("tokenizer", [BYTES, WRAPPED], ids=["bytes", "wrapped"])


def stream(tokenizer, prompt_ids, ids) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids)
    return [*(detokenizer.push([i]) for i in ids), detokenizer.finish()]


def fallback_tokenizer() -> JsonTokenizer:
    """A tokenizer like that of Llama 2: words with a space mark, bytes for the rest."""
    names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581a", "\u2581b"]
    merges = [("\u2581", "a"), ("\u2581", "b")]
    model = models.BPE({name: i for i, name in enumerate(names)}, merges, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:2]])
    return JsonTokenizer(tokenizer)


FALLBACK = fallback_tokenizer()


@given(st.text("ab é🦊日", min_size=1, max_size=20), st.text("ab é🦊日", max_size=20))
def test_fallback_bytes_are_joined_after_any_token(prompt, text):
    prompt_ids = FALLBACK.encode(prompt)
    ids = FALLBACK.encode(prompt + text)
    assert ids[: len(prompt_ids)] == prompt_ids or text.startswith("a") or text.startswith("b")
    if ids[: len(prompt_ids)] == prompt_ids:
        assert "".join(stream(FALLBACK, prompt_ids, ids[len(prompt_ids) :])) == text


def test_an_answer_cut_within_a_character_keeps_earlier_characters():
    fox = FALLBACK.encode("🦊")[1:]
    assert len(fox) == 4
    parts = stream(FALLBACK, FALLBACK.encode("a") + fox, [*fox, *fox[:2]])
    assert "".join(parts) == "🦊\ufffd"
    assert "".join(stream(FALLBACK, [*fox, *fox[:2]], [*fox[2:], *fox])) == "🦊🦊"


def test_the_space_of_the_first_word_is_kept_only_after_special_tokens():
    a = FALLBACK.encode("a")
    assert "".join(stream(FALLBACK, [0] * 30, a)) == " a"


@both
def test_tokens_without_text_are_not_buffered(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode("x"))
    for _ in range(100):
        assert detokenizer.push([9999]) == ""
    assert len(detokenizer._ids) < 20 and detokenizer.push(tokenizer.encode("y")) == "y"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> SentencePieceTokenizer:
    folder = tmp_path_factory.mktemp("spm")
    words = ["fox", "hound", "river", "stone", "light", "naïve", "und", "der"]
    drawn = random.Random(1)
    lines = [" ".join(drawn.choices(words, k=8)) for _ in range(200)]
    return SentencePieceTokenizer(train_sentencepiece(folder, lines))


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_and_decoding_keep_the_text(text, pieces, smollm2):
    for tokenizer in (BYTES, pieces, load_tokenizer(smollm2)):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(max_size=40), st.text(max_size=40))
def test_streamed_pieces_are_the_whole_text(prompt, text):
    prompt_ids, ids = BYTES.encode(prompt), BYTES.encode(text)
    parts = stream(BYTES, prompt_ids, ids)
    assert "".join(parts) == text
    # each character appears with its last byte, never in part
    known = [b"".join(c.encode() for c in text)[: n + 1] for n in range(len(ids))]
    shown = ["".join(parts[: n + 1]) for n in range(len(ids))]
    if "\ufffd" not in prompt + text:
        assert shown == [part.decode(errors="ignore") for part in known]


def test_any_tokens_of_a_byte_level_vocabulary_stream_as_the_library_decodes_them(smollm2):
    tokenizer = load_tokenizer(smollm2)
    vocab_size = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json")).get_vocab_size()
    drawn = random.Random(1)
    # many of the first tokens are only parts of characters
    for most in (300, vocab_size + 10):
        for _ in range(300):
            ids = [drawn.randrange(most) for _ in range(30)]
            prompt_ids = ids[: drawn.randrange(30)]
            assert "".join(stream(tokenizer, [], ids)) == tokenizer.decode(ids)
            tail = stream(tokenizer, prompt_ids, ids[len(prompt_ids) :])
            assert tokenizer.decode(ids).endswith("".join(tail))


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_keep_every_space(text, pieces, smollm2):
    for tokenizer in (pieces, load_tokenizer(smollm2)):
        prompt_ids = tokenizer.encode("the river")
        ids = tokenizer.encode("the river" + text)
        assert ids[: len(prompt_ids) - 1] == prompt_ids[:-1]
        whole = tokenizer.decode(ids)
        shown = tokenizer.decode(prompt_ids)
        parts = stream(tokenizer, prompt_ids, ids[len(prompt_ids) :])
        if ids[: len(prompt_ids)] == prompt_ids:
            assert shown + "".join(parts) == whole


def test_special_tokens_add_no_text_and_lose_no_space(pieces):
    ids = pieces.encode("fox river", add_special_tokens=False)
    eos = next(iter(pieces.special_ids - {pieces.encode("")[0]}))
    spaced = [ids[0], eos, *ids[1:]]
    assert "".join(stream(pieces, pieces.encode("stone"), spaced)) == " fox river"


def test_incomplete_characters_are_emitted_at_the_end():
    invalid = BYTES.encode("é")[:1]
    assert stream(BYTES, [], invalid) == ["", "\ufffd"]
    parts = stream(BYTES, [], invalid * 40)
    assert "".join(parts) == "\ufffd" * 40 and parts[20:] != [""] * 20 + ["\ufffd"]
    assert "".join(stream(BYTES, [], invalid + BYTES.encode("ok"))) == "\ufffdok"


@both
def test_a_prompt_may_end_within_a_character(tokenizer):
    first, second = tokenizer.encode("é")
    assert "".join(stream(tokenizer, [*tokenizer.encode("caf"), first], [second])) == "é"


def test_an_unknown_id_adds_nothing():
    for tokenizer in (BYTES, WRAPPED, FALLBACK):
        ids = tokenizer.encode("a")
        assert stream(tokenizer, [], [*ids, -1, 10**6]) == [*stream(tokenizer, [], ids), "", ""]


def test_tokenizer_json_is_preferred_and_read_without_its_truncation(tmp_path, pieces):
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"never read")
    assert len(load_tokenizer(tmp_path).encode("four")) == 4


def test_a_sentencepiece_folder_says_whether_texts_begin_with_a_token(tmp_path, pieces):
    serialised = pieces.processor.serialized_model_proto()
    (tmp_path / "tokenizer.model").write_bytes(serialised)
    assert load_tokenizer(tmp_path).encode("fox") == pieces.encode("fox")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert load_tokenizer(tmp_path).encode("fox") == pieces.encode("fox")[1:]
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_broken_tokenizer_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80nonsense")
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_ids_beyond_the_vocabulary_are_refused_but_for_names_of_special_tokens(
    tmp_path, pieces, kind
):
    if kind == "tokenizer.json":
        made = byte_tokenizer()
        largest = max(made.get_vocab(with_added_tokens=False).values())
        made.save(str(tmp_path / kind))
    else:
        largest = pieces.processor.GetPieceSize() - 1
        (tmp_path / kind).write_bytes(pieces.processor.serialized_model_proto())
    size = load_tokenizer(tmp_path).largest_id + 1
    assert size > largest
    # many folders list a padding token that their model lacks
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<some pad>"}')
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
    assert load_tokenizer(tmp_path).encode("<some pad>")[-1] >= size
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size - 1}))
    with pytest.raises(CheckpointError, match=f"has ids up to {size - 1}, but vocab_size"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither"):
        load_tokenizer(tmp_path)
