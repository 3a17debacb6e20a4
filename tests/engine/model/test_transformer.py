"""The transformer: configuration errors, tables, rotary scaling, traces, executor outputs."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.model.config import MemoryConfig
from engine.model.layout import TokenLayout
from engine.model.rope_scaling import Llama3Scaling
from engine.model.rotary import rope_frequencies
from engine.model.transformer import Transformer
from memory_ops.tables.device import DeviceTable
from tests.models import (
    feed_forward_changes,
    plain_logits,
    random_model,
    served_logits,
    tiny_config,
)

MEMORY = MemoryConfig(num_heads=2, num_subkeys=8, top_k=3, query_dim=8, value_dim=32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_equals_transformers(factor):
    scaling = Llama3Scaling(factor, 1.0, 4.0, 8192)
    config = LlamaConfig(
        head_dim=128,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    torch.testing.assert_close(rope_frequencies(128, 500_000.0, scaling), expected)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"feed_forward": ("dense",)}, "feed_forward"),
        ({"feed_forward": ("dense", "sparse")}, "feed_forward"),
        ({"feed_forward": ("dense", "pkm")}, "memory"),
        ({"memory": MEMORY}, "memory"),
        ({"qkv_bias": True, "attention_bias": True}, "qkv_bias"),
        ({"qkv_bias": True, "qk_norm": True}, "qkv_bias"),
        ({"qkv_bias": True, "mlp_bias": True}, "qkv_bias"),
        ({"qk_norm": True, **feed_forward_changes("dense", "moe")}, "qk_norm"),
        (feed_forward_changes("memory_plus", "moe", placement="beside"), "memory.placement"),
    ],
)
def test_a_wrong_field_is_named(changes, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"top_k": 9}, "top_k"),
        ({"query_dim": 7}, "query_dim"),
        ({"num_heads": 0}, "num_heads"),
        ({"placement": "above"}, "placement"),
    ],
)
def test_a_wrong_memory_field_is_named(changes, field):
    values = {"num_heads": 2, "num_subkeys": 8, "top_k": 3, "query_dim": 8, "value_dim": 32}
    with pytest.raises(ValueError, match=f"^{field}: "):
        MemoryConfig(**(values | changes))


def test_different_widths_require_a_projection():
    narrow = MemoryConfig(2, 8, 3, query_dim=8, value_dim=24)
    with pytest.raises(ValueError, match="value_dim"):
        tiny_config(feed_forward=("dense", "pkm"), memory=narrow)
    projected = MemoryConfig(2, 8, 3, query_dim=8, value_dim=24, value_projection=True)
    with pytest.raises(ValueError, match="value_projection"):
        tiny_config(feed_forward=("dense", "memory_plus"), memory=projected)


def test_tables_must_fit_the_memory_layers():
    config = tiny_config(feed_forward=("memory_plus", "dense"), memory=MEMORY)
    model = Transformer(config)
    with pytest.raises(ValueError, match="tables"):
        model.attach_tables({"memory.tables": DeviceTable(torch.zeros(64, 32))})
    with pytest.raises(ValueError, match="tables"):
        model.attach_tables({"memory.table": DeviceTable(torch.zeros(63, 32))})


def test_a_shared_table_is_one_object_and_own_tables_are_not():
    kinds = ("memory_plus", "pkm")
    shared = random_model(tiny_config(feed_forward=kinds, memory=MEMORY))
    assert shared.model.layers[0].memory.table is shared.model.layers[1].memory.table
    own = MemoryConfig(2, 8, 3, query_dim=8, value_dim=32, share_values=False)
    separate = random_model(tiny_config(feed_forward=kinds, memory=own))
    assert separate.model.layers[0].memory.table is not separate.model.layers[1].memory.table


def test_biases_and_a_tied_head_change_the_logits():
    ids = [1, 2, 3]
    for change in ({"attention_bias": True}, {"mlp_bias": True}, {"tie_embeddings": True}):
        model = random_model(tiny_config(**change))
        before = plain_logits(model, ids)
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        for parameter in biases or [model.model.embed_tokens.weight]:
            parameter.add_(0.5)
        assert not torch.allclose(before, plain_logits(model, ids))


def test_frequencies_stay_fp32_in_a_bfloat16_model():
    model = random_model(tiny_config())
    before = model.rope_frequencies.clone()
    narrow = model.bfloat16()
    assert narrow.model.norm.weight.dtype is torch.bfloat16
    assert torch.equal(narrow.rope_frequencies, before)


def test_a_trace_has_the_rows_and_weights_of_each_memory_layer():
    kinds = ("memory_plus", "dense", "pkm")
    model = random_model(tiny_config(num_layers=3, feed_forward=kinds, memory=MEMORY))
    ids, positions = torch.tensor([1, 2, 3]), torch.arange(3)
    layout, last = TokenLayout(positions, (0, 3)), torch.tensor([2])
    plain = model(ids, layout, last, with_hidden=True)
    traced = model(ids, layout, last, with_trace=True)
    assert plain.memory == {} and list(traced.memory) == [0, 2]
    torch.testing.assert_close(traced.logits_LV, plain.logits_LV)
    for layer, trace in traced.memory.items():
        assert trace.rows_THK.shape == trace.weights_THK.shape == (3, 2, 3)
        torch.testing.assert_close(trace.weights_THK.sum(-1), torch.ones(3, 2))
        # changing all other rows changes nothing
        table = model.model.layers[layer].memory.table
        untouched = torch.ones(table.num_rows, dtype=torch.bool)
        for other in traced.memory.values():
            untouched[other.rows_THK.flatten()] = False
        table.rows[untouched] += 100
    torch.testing.assert_close(model(ids, layout, last).logits_LV, plain.logits_LV)
    hidden = torch.nn.functional.linear(plain.hidden_LD, model.lm_head.weight)
    torch.testing.assert_close(hidden, plain.logits_LV)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", ["dense", "moe", "memory_plus", "pkm", "peer", "normed"])
def test_the_executor_gives_the_same_logits_and_does_not_change_the_model(kind, dtype, beside):
    is_pkm = kind == "pkm"
    if beside and kind in ("dense", "moe"):
        pytest.skip("no memory")
    memory = dict.fromkeys(("qk_norm", "output_gate", "value_projection"), is_pkm)
    memory |= {"placement": "beside", "scalar_gate": True} if beside else {}
    memory |= {"top_k": 8, "value_dim": 24 if kind in ("memory_plus", "pkm") else 32}
    if kind == "normed":
        changes = feed_forward_changes("dense", "memory_plus", **memory) | {"qk_norm": True}
    else:
        changes = feed_forward_changes("dense", kind, **memory) | {"mlp_bias": True}
    model = random_model(tiny_config(attention_bias=True, **changes), dtype)
    wanted = plain_logits(model, list(range(60)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = served_logits(model, list(range(60)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # bf16 rounding errors add up over the layers
    rtol, atol = (1e-3, 1e-3) if dtype == torch.float32 else (0.1, 0.5)
    if kind in ("moe", "peer") and dtype is torch.bfloat16:
        # two experts with nearly equal scores may change places
        close_T = torch.isclose(found, wanted, rtol=rtol, atol=atol).all(1)
        assert close_T.float().mean() > 0.9
        found, wanted = found[close_T], wanted[close_T]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
