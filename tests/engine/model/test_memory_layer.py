"""The memory layer against golden outputs of the reference implementation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.model.config import MemoryConfig
from engine.model.memory_layer import MemoryLayer
from memory_ops.tables.device import DeviceTable

GOLDEN = Path(__file__).parents[2] / "golden"
VARIANTS = ["memory_plus", "plain", "plain_wide", "memory_plus_wide", "gated", "peer"]


def build(variant: str, dtype: torch.dtype) -> tuple[MemoryLayer, dict[str, torch.Tensor]]:
    """Our layer with the golden weights of the reference."""
    params = json.loads((GOLDEN / "params.json").read_text())[variant]
    tensors = load_file(GOLDEN / f"{variant}.safetensors")
    is_peer = params.get("peer_variant", False)
    gated = params["swilu_projection"] and not is_peer
    config = MemoryConfig(
        num_heads=params["mem_heads"],
        num_subkeys=params["mem_n_keys"],
        top_k=params["mem_knn"],
        query_dim=params["mem_k_dim"],
        value_dim=params.get("mem_v_dim", params["dim"]),
        value_projection=not gated and not is_peer and "mem_v_dim" in params,
        output_gate=params.get("mem_gated", False),
    )
    kind = "peer" if is_peer else "memory_plus" if gated else "pkm"
    layer = MemoryLayer(config, kind, params["dim"], norm_eps=1e-5).to(dtype)
    named = {
        "query.": "query_proj.query_mlps.0.",
        "gate.": "swilu_projection.",
        "value_proj.": "value_proj.",
        "output_gate.": "gating.",
    }
    state = {"subkeys": tensors["weights.keys"].view(layer.subkeys.shape)}
    for ours, theirs in named.items():
        for part in ("weight", "bias"):
            # the reference stores projections that its peer variant does not use
            if f"weights.{theirs}{part}" in tensors and (ours == "query." or not is_peer):
                state[ours + part] = tensors[f"weights.{theirs}{part}"]
    layer.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()})
    if is_peer:
        tables = [tensors[f"weights.values_{name}.weight"].to(dtype) for name in "vu"]
        layer.attach(*map(DeviceTable, tables))
    else:
        layer.attach(DeviceTable(tensors["weights.values.weight"].to(dtype)))
    return layer.requires_grad_(False), tensors


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_equals_the_reference_layer(variant, dtype, tolerance):
    layer, tensors = build(variant, dtype)
    out = layer(tensors["input"].to(dtype))
    torch.testing.assert_close(out, tensors["output"].to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_equal_those_of_the_reference_layer(variant):
    layer, tensors = build(variant, torch.float64)
    read = []
    down = [layer.down_table] if layer.is_peer else []

    class Watched(DeviceTable):
        def start(self, rows_THK, weights_THK, layer=0):
            read.append(rows_THK)
            return super().start(rows_THK, weights_THK)

    layer.attach(Watched(layer.table.rows), *down)
    layer(tensors["input"].double())
    torch.testing.assert_close(read[0].sort(-1).values, tensors["rows"].long().sort(-1).values)


def test_qk_norm_normalises_each_half_separately():
    config = MemoryConfig(2, 6, 3, query_dim=8, value_dim=5, qk_norm=True)
    layer = MemoryLayer(config, "memory_plus", 7, norm_eps=1e-5).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(4, 7, dtype=torch.float64)
    halves = layer.query(x).view(4, 2, 2, 4)
    normed = halves / (halves.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = torch.einsum("thck,hcnk->thcn", normed * layer.query_norm, layer.subkeys)
    torch.testing.assert_close(layer.half_scores(x), expected)


def test_scores_of_a_bfloat16_layer_are_fp32():
    config = MemoryConfig(2, 6, 3, query_dim=8, value_dim=5)
    layer = MemoryLayer(config, "memory_plus", 7, norm_eps=1e-5)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer = layer.to(torch.bfloat16)
    x = torch.randn(4, 7).to(torch.bfloat16)
    queries = layer.query(x).view(4, 2, 2, 4)
    exact = torch.einsum("thck,hcnk->thcn", queries.double(), layer.subkeys.double())
    scores = layer.half_scores(x)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=1e-6, atol=1e-5)
