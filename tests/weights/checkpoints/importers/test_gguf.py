"""GGUF import: the model and tokenizer equal those that wrote the file."""

import json
import struct
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from tokenizers import Regex, pre_tokenizers

from engine.model.grouped_layers import group_formats
from engine.model.grouped_weights import GroupFormat
from engine.model.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from engine.model.rotary import rope_frequencies
from tests.models import (
    byte_tokenizer,
    model_tensors,
    random_model,
    tiny_config,
    train_sentencepiece,
)
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.config_json import read_config
from weights.checkpoints.convert import convert
from weights.checkpoints.importers.gguf_groups import GROUP_FORMATS
from weights.checkpoints.model_bytes import model_bytes
from weights.checkpoints.tokenizer import load_tokenizer
from weights.errors import CheckpointError
from weights.models.named_models import find_model

SCALING = Llama3Scaling(32.0, 1.0, 4.0, 8192)
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    top = {"embed_tokens": "token_embd", "norm": "output_norm"}
    *parts, kind = name.removeprefix("model.").split(".")
    if parts[0] == "lm_head":
        return "output.weight"
    if parts[0] != "layers":
        return f"{top[parts[0]]}.weight"
    return f"blk.{parts[1]}.{LAYER['.'.join(parts[2:])]}.{kind}"


def with_adjacent_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The row order of llama.cpp for q and k: rotary pairs are adjacent."""
    rows = weight.shape[0] // num_heads
    order = [half * rows // 2 + lane for lane in range(rows // 2) for half in range(2)]
    return weight.reshape(num_heads, rows, -1)[:, order].reshape(weight.shape)


def write_gguf(path: Path, model, quantisation=gguf.GGMLQuantizationType.F32, *, changes) -> Path:
    config = model.config
    architecture = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    changes(writer)
    for name, tensor in model_tensors(model).items():
        if ".q_proj." in name and architecture == "llama":
            tensor = with_adjacent_pairs(tensor, config.num_heads)
        if ".k_proj." in name and architecture == "llama":
            tensor = with_adjacent_pairs(tensor, config.num_kv_heads)
        kind = quantisation if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(tensor.numpy(), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    if isinstance(config.rope_scaling, Llama3Scaling):
        plain = rope_frequencies(config.head_dim, config.rope_theta, None)
        scaled = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_tokenizer(writer, pre: str) -> None:
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([1] * 256 + [3] * 4)
    writer.add_token_merges(["a b", "1 2"])
    writer.add_eos_token_id(256)


def wide_model(**changes):
    # rows of at least 32 values, since quantised formats have blocks of 32
    return random_model(tiny_config(**({"intermediate_size": 64} | changes)))


def with_merges(writer) -> None:
    vocabulary = byte_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokens[258], tokens[259] = "ab", "12"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(257)
    writer.add_add_bos_token(True)
    writer.add_eos_token_id(256)
    writer.add_eot_token_id(257)
    writer.add_chat_template("{{ messages }}")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": SCALING},
        {"attention_bias": True},
        {"qkv_bias": True, "tie_embeddings": True},
        {"qk_norm": True},
        {"qk_norm": True, "attention_bias": True},
    ],
)
def test_unquantised_weights_are_imported_exactly(tmp_path, changes):
    model = wide_model(**changes)
    convert(write_gguf(tmp_path / "m.gguf", model, changes=with_merges), tmp_path / "m", "float32")
    loaded, config = load_model(tmp_path / "m")
    assert config.model == model.config
    assert (config.eos_ids, config.bos_id) == (frozenset({256, 257}), 257)
    expected = model_tensors(model)
    for name, tensor in model_tensors(loaded).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["QWEN2", "QWEN3"])
def test_names_of_tensors_are_those_of_the_gguf_package(architecture):
    extra = {"qkv_bias": True} if architecture == "QWEN2" else {"qk_norm": True}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], 2)
    for name in model_tensors(wide_model(**extra)):
        assert gguf_name(name) == names.get_name(name, try_suffixes=(".weight", ".bias"))


@pytest.mark.parametrize(
    ("kind", "keys", "scaling"),
    [
        ("none", {}, None),
        ("linear", {"factor": 4.0}, LinearScaling(4.0)),
        ("yarn", {"factor": 4.0, "original_context_length": 32}, YarnScaling(4.0, 32)),
    ],
)
def test_scalings_of_rotary_embeddings_are_read(tmp_path, kind, keys, scaling):
    def scaled(writer):
        with_merges(writer)
        writer.add_string("qwen2.rope.scaling.type", kind)
        for key, value in keys.items():
            add = writer.add_float32 if key == "factor" else writer.add_uint32
            add(f"qwen2.rope.scaling.{key}", value)

    model = wide_model(qkv_bias=True)
    convert(write_gguf(tmp_path / "m.gguf", model, changes=scaled), tmp_path / "m")
    assert read_config(tmp_path / "m").model.rope_scaling == scaling


def test_a_sliding_window_limits_the_positions(tmp_path):
    def windowed(writer):
        with_merges(writer)
        writer.add_sliding_window(24)

    convert(write_gguf(tmp_path / "m.gguf", wide_model(), changes=windowed), tmp_path / "m")
    assert read_config(tmp_path / "m").model.max_positions == 24


def test_qwens_words_and_normal_forms(tmp_path):
    def qwen(writer):
        add_bytes(writer, "qwen2")

    path = write_gguf(tmp_path / "m.gguf", wide_model(vocab_size=262), changes=qwen)
    convert(path, tmp_path / "m")
    tokenizer = load_tokenizer(tmp_path / "m")
    assert tokenizer.decode(tokenizer.encode("e\u0301 12 ab")) == "\u00e9 12 ab"
    pieces = json.loads((tmp_path / "m" / "tokenizer.json").read_text())["pre_tokenizer"]
    splitter = pre_tokenizers.Split(
        Regex(pieces["pretokenizers"][0]["pattern"]["Regex"]), behavior="isolated"
    )
    words = [word for word, _ in splitter.pre_tokenize_str("I'll pay 250 euros!!\n\n ok")]
    expected = ["I", "'ll", " pay", " ", "2", "5", "0", " euros", "!!\n\n", " ok"]
    assert words == expected


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_quantised_weights_equal_those_of_the_gguf_package(tmp_path, kind):
    model, quantisation = wide_model(tie_embeddings=True), gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "m.gguf", model, quantisation, changes=with_merges)
    convert(path, tmp_path / "m", "float32")
    loaded, _ = load_model(tmp_path / "m")
    assert loaded.lm_head is None
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        exact = model_tensors(model)[name].numpy()
        expected = gguf.dequantize(gguf.quantize(exact, quantisation), quantisation)
        np.testing.assert_array_equal(model_tensors(loaded)[name].numpy(), expected)


def test_the_pre_tokenizer_and_begin_token_are_kept(tmp_path):
    convert(write_gguf(tmp_path / "m.gguf", wide_model(), changes=with_merges), tmp_path / "m")
    tokenizer = load_tokenizer(tmp_path / "m")
    ab, twelve = 258, 259
    assert tokenizer.encode("ab")[0] == 257 and tokenizer.encode("ab")[1:] == [ab]
    # smollm splits digits, so the merge of 1 and 2 never happens
    assert twelve not in tokenizer.encode("a12b")
    assert tokenizer.decode(tokenizer.encode("a12b é")) == "a12b é"
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}"


def test_llama_3_adds_a_begin_token_by_default(tmp_path):
    def llama3(writer):
        add_bytes(writer, "llama-bpe")
        writer.add_bos_token_id(257)

    path = write_gguf(tmp_path / "m.gguf", wide_model(vocab_size=262), changes=llama3)
    convert(path, tmp_path / "m")
    assert load_tokenizer(tmp_path / "m").encode("a")[0] == 257


def test_a_sentencepiece_vocabulary_tokenises_like_sentencepiece(tmp_path):
    lines = ["the cat sat on the mat and the hat", "many cats sat on many mats"] * 20
    original = sentencepiece.SentencePieceProcessor(
        model_proto=train_sentencepiece(tmp_path, lines)
    )
    size = original.GetPieceSize()

    def add_tokenizer(writer):
        kinds = [
            2 if original.IsUnknown(i) else 3 if original.IsControl(i)
            else 6 if original.IsByte(i) else 1
            for i in range(size)
        ]  # fmt: skip
        writer.add_tokenizer_model("llama")
        writer.add_token_list([original.IdToPiece(i) for i in range(size)])
        writer.add_token_scores([original.GetScore(i) for i in range(size)])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(original.bos_id())
        writer.add_eos_token_id(original.eos_id())
        writer.add_unk_token_id(original.unk_id())

    path = write_gguf(tmp_path / "m.gguf", wide_model(vocab_size=size), changes=add_tokenizer)
    convert(path, tmp_path / "m")
    tokenizer = load_tokenizer(tmp_path / "m")
    for text in ("the cat sat", "  two  spaces", "naïve 日本 🦊", "cats\n\nmats", ""):
        assert tokenizer.encode(text) == [original.bos_id(), *original.EncodeAsIds(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def with_novel_scaling(writer) -> None:
    writer.add_string("llama.rope.scaling.type", "novel")
    writer.add_float32("llama.rope.scaling.factor", 2.0)


def test_unknown_files_architectures_tokenizers_and_tensors_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF, they said")
    with pytest.raises(CheckpointError, match="is truncated or not a GGUF file"):
        convert(path, tmp_path / "m")

    def refused(match, changes):
        path.unlink()
        write_gguf(path, wide_model(), changes=changes)
        with pytest.raises(CheckpointError, match=match):
            convert(path, tmp_path / "m")
        assert not (tmp_path / "m").exists()

    def also(change):
        return lambda writer: (with_merges(writer), change(writer))

    refused("tokenizer.ggml.merges", lambda writer: add_byte_tokenizer(writer, "smollm"))
    refused("rope.scaling.type", also(with_novel_scaling))
    refused("rope.scaling.factor", also(lambda w: w.add_string("llama.rope.scaling.type", "yarn")))
    refused("novel.weight", also(lambda w: w.add_tensor("novel.weight", np.zeros(2, np.float32))))
    refused("logit_scale", also(lambda w: w.add_logit_scale(2.0)))
    refused("sliding_window", also(lambda w: w.add_sliding_window(0)))
    refused("attention.scale", also(lambda w: w.add_float32("llama.attention.scale", 2.0)))
    refused("head_count", also(lambda w: w.add_head_count(0)))
    refused("head_count_kv", also(lambda w: w.add_head_count_kv([2, 2])))
    refused("bos_token_id", also(lambda w: w.add_bos_token_id(9999)))
    refused("expert_count", also(lambda w: w.add_expert_count(8)))
    refused("tokenizer.ggml.pre", lambda writer: add_bytes(writer, "novel"))


def add_pieces(writer, *more, types=True, scores=True) -> None:
    """A sentencepiece vocabulary of bytes and some pieces, each a name and a type."""
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256))]
    pieces += [(text, 1) for text in ("\u2581", "a", "b", "ab", "\u2581ab")] + list(more)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([name for name, _ in pieces])
    if types:
        writer.add_token_types([kind for _, kind in pieces])
    if scores:
        writer.add_token_scores([-float(i) for i in range(len(pieces))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def add_bytes(writer, pre="gpt-2", types=True, merges=True, twice=False) -> None:
    vocabulary = byte_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.get), "ab", "ab" if twice else "bc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if types:
        writer.add_token_types([1] * 256 + [3] * 4 + [1, 1])
    if merges:
        writer.add_token_merges(["a b", "b c"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (partial(add_bytes, merges=False), "tokenizer.ggml.merges: missing"),
        (partial(add_bytes, types=False), "tokenizer.ggml.token_type: missing"),
        (partial(add_bytes, twice=True), "tokenizer.ggml.tokens: 'ab' is the name of 2 tokens"),
        (partial(add_pieces, scores=False), "tokenizer.ggml.scores: missing"),
        (partial(add_pieces, types=False), "tokenizer.ggml.token_type: missing"),
        (lambda w: add_pieces(w, ("ab", 1)), "tokenizer.ggml.tokens: 'ab' is the name of 2 tokens"),
        (lambda w: add_pieces(w, ("", 1)), "tokenizer.ggml.tokens: not a whole vocabulary"),
        (lambda w: add_pieces(w, ("c", 6)), "tokenizer.ggml.tokens: not a whole vocabulary"),
        (lambda w: add_pieces(w, ("<unk2>", 2)), "tokenizer.ggml.tokens: not a whole vocabulary"),
        (lambda w: add_pieces(w, ("c", 77)), "tokenizer.ggml.token_type: 77 is not a type"),
    ],
)
def test_tokenizers_that_are_not_whole_are_refused(tmp_path, change, message):
    path = write_gguf(tmp_path / "m.gguf", wide_model(), changes=change)
    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("lists", ["token_type", "scores"])
def test_lists_of_another_length_are_refused(tmp_path, lists):
    def change(writer):
        add_pieces(writer)
        del writer.kv_data[0][f"tokenizer.ggml.{lists}"]
        if lists == "token_type":
            writer.add_token_types([1, 2])
        else:
            writer.add_token_scores([1.0, 2.0])

    path = write_gguf(tmp_path / "m.gguf", wide_model(), changes=change)
    with pytest.raises(CheckpointError, match=f"{lists}: has 2 entries for 264 tokens"):
        convert(path, tmp_path / "m")


@pytest.mark.parametrize("add_tokenizer", [add_bytes, add_pieces])
def test_an_end_token_is_added_if_the_file_says_so(tmp_path, add_tokenizer):
    def change(writer):
        add_tokenizer(writer)
        if add_tokenizer is add_bytes:
            writer.add_eos_token_id(256)
        writer.add_add_eos_token(True)

    size = 262 if add_tokenizer is add_bytes else 264
    path = write_gguf(tmp_path / "m.gguf", wide_model(vocab_size=size), changes=change)
    convert(path, tmp_path / "m")
    tokenizer = load_tokenizer(tmp_path / "m")
    assert tokenizer.end_ids == ((256,) if add_tokenizer is add_bytes else (2,))
    assert tokenizer.encode("ab")[-1:] == [*tokenizer.end_ids]


def test_a_truncated_file_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", wide_model(), changes=with_merges)
    whole = path.read_bytes()
    for keep in (3, 20, 4000, len(whole) - 100):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match="is truncated or not a GGUF file"):
            convert(path, tmp_path / "m")


def written(kind, tmp_path):
    """A model, and one that was converted from its file in this format without a dtype."""
    model = wide_model(tie_embeddings=True)
    quantisation = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "m.gguf", model, quantisation, changes=with_merges)
    convert(path, tmp_path / "m")
    stored, config = load_model(tmp_path / "m", keep_stored=True)
    dense, _ = load_model(tmp_path / "m", "float32")
    exact = {name: tensor.numpy() for name, tensor in model_tensors(model).items()}
    expected = {
        name: gguf.dequantize(gguf.quantize(one, quantisation), quantisation)
        for name, one in exact.items()
        if one.ndim == 2
    }
    found = {name: model_tensors(dense)[name].numpy() for name in expected}
    return group_formats(stored), config, found, expected


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_that_are_groups_keep_their_values(tmp_path, kind):
    formats, config, found, expected = written(kind, tmp_path)
    assert config.has_groups and config.dtype == "bfloat16"
    wanted = GROUP_FORMATS[gguf.GGMLQuantizationType[kind]]
    assert set(formats.values()) == {wanted} and len(formats) == 15
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1"])
def test_other_quantised_weights_are_rounded_to_8_bits(tmp_path, kind):
    formats, _, found, expected = written(kind, tmp_path)
    assert set(formats.values()) == {GroupFormat(8)}
    for name, values in expected.items():
        groups = values.reshape(len(values), -1, 32)
        step = np.abs(groups).max(axis=2, keepdims=True) / 127
        errors = np.abs(found[name].reshape(groups.shape) - groups)
        assert (errors <= step * 0.51).all()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")]
)
def test_weights_that_are_not_quantised_keep_their_dtype(tmp_path, kind, dtype):
    formats, config, found, expected = written(kind, tmp_path)
    assert not formats and not config.has_groups and config.dtype == dtype
    stored, _ = load_model(tmp_path / "m", keep_stored=True)
    # the file has its norms in fp32
    assert stored.model.norm.weight.dtype is torch.float32
    assert stored.model.embed_tokens.weight.dtype is getattr(torch, dtype)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_quantised_weights_are_served_in_bfloat16_with_the_norms_of_the_file(tmp_path):
    model = wide_model()
    model.model.norm.weight.data.uniform_(0.5, 1.5)
    path = write_gguf(
        tmp_path / "m.gguf", model, gguf.GGMLQuantizationType.Q8_0, changes=with_merges
    )
    convert(path, tmp_path / "m")
    assert model_bytes(tmp_path / "m", "auto", "auto").dtype is torch.bfloat16
    loaded, _ = load_model(tmp_path / "m", "float32")
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)


def test_upper_case_names_of_files_are_read(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", wide_model(), changes=with_merges)
    convert(path.rename(tmp_path / "M.GGUF"), tmp_path / "m")
    assert find_model(str(tmp_path / "M.GGUF"), tmp_path).source == tmp_path / "M.GGUF"
    split = split_gguf(tmp_path / "M.GGUF")
    first, _ = (one.rename(one.with_name(one.name.upper())) for one in split)
    convert(first, tmp_path / "split")


def header(*values: bytes) -> bytes:
    """A GGUF header with one key "a" and no tensors."""
    counts = struct.pack("<IQQ", 3, 0, 1)
    return b"".join((b"GGUF", counts, struct.pack("<Q", 1), b"a", *values))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(header(struct.pack("<IIQ", 9, 0, 2**60), bytes(100)), id="numbers"),
        pytest.param(header(struct.pack("<IIQ", 9, 8, 2**60), bytes(100)), id="strings"),
        pytest.param(header(struct.pack("<IQ", 8, 2**62), bytes(100)), id="string"),
        pytest.param(header(struct.pack("<IIQ", 9, 9, 1) * 5000), id="nested"),
    ],
)
def test_lengths_beyond_the_file_are_refused_at_once(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.gguf: is truncated or not a GGUF file"):
        convert(tmp_path / "m.gguf", tmp_path / "m")


def test_headers_of_too_many_values_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("weights.checkpoints.importers.gguf_metadata._MOST_VALUES", 500)
    path = write_gguf(tmp_path / "m.gguf", wide_model(), changes=with_merges)
    with pytest.raises(CheckpointError, match="its header has more than 500 values"):
        convert(path, tmp_path / "m")


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("llama.block_count", 2**24, "is 16777216, but tensor blk.2.attn_norm.weight"),
        ("llama.block_count", "two", "must be of type int, not 'two'"),
        ("llama.embedding_length", [32], r"must be of type int, not \[32\]"),
        ("llama.attention.layer_norm_rms_epsilon", "small", "must be of type float, not 'small'"),
        ("llama.rope.freq_base", [1.0], "must be of type float"),
        ("split.count", "one", "must be of type int"),
        ("tokenizer.ggml.tokens", 260, "must be an array of type str"),
        ("tokenizer.ggml.token_type", ["a"], "must be an array of type int"),
        ("tokenizer.ggml.merges", [1], "must be an array of type str"),
        ("tokenizer.ggml.eos_token_id", "256", "must be of type int"),
        ("tokenizer.ggml.bos_token_id", -1, "-1 is outside the vocabulary"),
        ("tokenizer.ggml.add_bos_token", 1, "must be of type bool"),
        ("tokenizer.chat_template", 7, "must be of type str"),
    ],
)
def test_metadata_of_wrong_types_are_refused_by_key(tmp_path, key, content, message):
    def change(writer):
        with_merges(writer)
        for values in writer.kv_data:
            values.pop(key, None)
        array, kind = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.get_type(content)
        items = gguf.GGUFValueType.get_type(content[0]) if kind == array else None
        writer.add_key_value(key, content, kind, items)

    path = write_gguf(tmp_path / "m.gguf", wide_model(), changes=change)
    with pytest.raises(CheckpointError, match=f"{key}: {message}"):
        convert(path, tmp_path / "m")


def split_gguf(path: Path, *, twice: bool = False) -> list[Path]:
    """Write the tensors of a file to two parts; ``twice`` writes one of them to both."""
    reader = gguf.GGUFReader(path)
    parts = [path.parent / f"{path.stem}-0000{number}-of-00002.gguf" for number in (1, 2)]
    half = len(reader.tensors) // 2
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors) + twice)
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith(("GGUF.", "general.architecture")):
                kinds = field.types
                sub_type = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), kinds[0], sub_type)
        for tensor in reader.tensors[half - twice :] if number else reader.tensors[:half]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def test_a_split_model_equals_a_whole_one(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", wide_model(), changes=with_merges)
    first, second = split_gguf(path)
    for source in (path, first):
        convert(source, tmp_path / source.stem, "float32")
    whole, split = (load_model(tmp_path / one.stem)[0] for one in (path, first))
    for name, tensor in model_tensors(whole).items():
        assert torch.equal(model_tensors(split)[name], tensor)
    with pytest.raises(CheckpointError, match="is part 2 of 2; give the first part"):
        convert(second, tmp_path / "second")
    with_twice, whole_file = tmp_path / "twice", second.read_bytes()
    split_gguf(path, twice=True)
    with pytest.raises(CheckpointError, match=r"tensor .*: is in part 2 and in an earlier one"):
        convert(first, with_twice)
    split_gguf(path)
    assert second.read_bytes() == whole_file
    # a part under another part's name
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="part 2 of 2 files is stored as 1 of 2"):
        convert(first, tmp_path / "wrong")
    with pytest.raises(CheckpointError, match="a model cannot have 0 parts"):
        convert(first.rename(tmp_path / "m-00001-of-00000.gguf"), tmp_path / "none")
    (tmp_path / "m-00001-of-00000.gguf").rename(first)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"{second}: is missing"):
        convert(first, tmp_path / "missing")
