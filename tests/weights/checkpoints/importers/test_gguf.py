"""GGUF import: the model and tokenizer equal those that wrote the file."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch

from engine.model.config import RopeScaling
from engine.model.rotary import rope_frequencies
from tests.models import (
    byte_tokenizer,
    model_tensors,
    random_model,
    tiny_config,
    train_sentencepiece,
)
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.convert import convert
from weights.checkpoints.tokenizer import load_tokenizer
from weights.errors import CheckpointError

SCALING = RopeScaling(32.0, 1.0, 4.0, 8192)
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    top = {"embed_tokens": "token_embd", "norm": "output_norm"}
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    if parts[0] == "lm_head":
        return "output.weight"
    if parts[0] != "layers":
        return f"{top[parts[0]]}.weight"
    return f"blk.{parts[1]}.{LAYER['.'.join(parts[2:])]}.weight"


def with_adjacent_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The row order of llama.cpp for q and k: rotary pairs are adjacent."""
    rows = weight.shape[0] // num_heads
    order = [half * rows // 2 + lane for lane in range(rows // 2) for half in range(2)]
    return weight.view(num_heads, rows, -1)[:, order].reshape(weight.shape)


def write_gguf(path: Path, model, quantisation=gguf.GGMLQuantizationType.F32, *, changes) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
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
        if ".q_proj." in name:
            tensor = with_adjacent_pairs(tensor, config.num_heads)
        if ".k_proj." in name:
            tensor = with_adjacent_pairs(tensor, config.num_kv_heads)
        kind = quantisation if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(tensor.numpy(), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    if config.rope_scaling is not None:
        plain = rope_frequencies(config.head_dim, config.rope_theta, None)
        scaled = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_tokenizer(writer, pre: str, merges=("a b", "1 2")) -> None:
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([1] * 256 + [3] * 4)
    writer.add_token_merges(merges)
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


@pytest.mark.parametrize("scaling", [None, SCALING])
def test_unquantised_weights_are_imported_exactly(tmp_path, scaling):
    model = wide_model(rope_scaling=scaling)
    convert(write_gguf(tmp_path / "m.gguf", model, changes=with_merges), tmp_path / "m", "float32")
    loaded, config = load_model(tmp_path / "m")
    assert config.model == model.config
    assert (config.eos_ids, config.bos_id) == (frozenset({256, 257}), 257)
    expected = model_tensors(model)
    for name, tensor in model_tensors(loaded).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


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
        add_byte_tokenizer(writer, "llama-bpe", merges=[])
        writer.add_bos_token_id(257)

    convert(write_gguf(tmp_path / "m.gguf", wide_model(), changes=llama3), tmp_path / "m")
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
    refused("rope.scaling.type", also(lambda w: w.add_string("llama.rope.scaling.type", "yarn")))
    refused("novel.weight", also(lambda w: w.add_tensor("novel.weight", np.zeros(2, np.float32))))
    refused("logit_scale", also(lambda w: w.add_logit_scale(2.0)))
    refused("sliding_window", also(lambda w: w.add_sliding_window(64)))
    refused("head_count", also(lambda w: w.add_head_count(0)))
    refused("head_count_kv", also(lambda w: w.add_head_count_kv([2, 2])))
    refused("bos_token_id", also(lambda w: w.add_bos_token_id(9999)))
    refused("expert_count", also(lambda w: w.add_expert_count(8)))
    refused("tokenizer.ggml.pre", lambda writer: add_byte_tokenizer(writer, "novel", merges=[]))


def test_a_truncated_file_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", wide_model(), changes=with_merges)
    whole = path.read_bytes()
    for keep in (3, 20, 4000, len(whole) - 100):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match="is truncated or not a GGUF file"):
            convert(path, tmp_path / "m")
