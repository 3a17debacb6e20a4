"""Sizes of models with and without weights, against those that the loader computes."""

import json

import pytest

from server.plan.options import PlanOptions
from server.plan.planned_model import planned_model
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints.model_bytes import model_bytes
from weights.errors import CheckpointError


@pytest.mark.parametrize("kinds", [("dense", "dense"), ("memory_plus", "pkm"), ("peer", "dense")])
@pytest.mark.parametrize(("table_dtype", "weight_dtype"), [("auto", "int4"), ("int8", "auto")])
def test_bytes_equal_those_of_the_loader(tmp_path, kinds, table_dtype, weight_dtype):
    config = tiny_config(**feed_forward_changes(*kinds))
    folder = save_model(random_model(config), tmp_path / "model")
    dtype = table_dtype if config.table_names else "auto"
    for one, kv in (("float32", "auto"), ("bfloat16", "int8")):
        options = PlanOptions(
            dtype=one,
            table_dtype=dtype,
            kv_dtype=kv,
            weight_dtype=weight_dtype,
        )
        wanted = model_bytes(folder, one, dtype, kv, weight_dtype)
        for source in (folder, folder / "config.json"):
            if source.is_file() and dtype == "auto":
                continue  # without weights a table is in bf16
            found = planned_model(source, options, is_on_gpu=False)
            assert found.weight_bytes == wanted.weights
            assert found.table_bytes == wanted.tables
            assert found.kv_bytes == wanted.kv_per_token
            assert found.dense == sum(one.numel() for one in random_model(config).parameters())


def test_a_config_without_weights_has_rows_of_bf16(tmp_path):
    config = tiny_config(**feed_forward_changes("memory_plus", "peer"))
    folder = save_model(random_model(config), tmp_path / "model")
    found = planned_model(folder / "config.json", PlanOptions(), is_on_gpu=False)
    memory = config.memory
    assert found.row_bytes == 2 * memory.value_dim
    assert found.table_bytes == len(config.table_names) * memory.num_rows * found.row_bytes
    # a memory_plus layer reads one table, a peer layer two
    assert found.config.rows_per_token == 3 * memory.num_heads * memory.top_k


def test_a_config_with_an_unknown_key_is_refused(tmp_path):
    file = save_model(random_model(tiny_config()), tmp_path / "model") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_sizes": 3}))
    with pytest.raises(CheckpointError, match=r"config.json: .*hidden_sizes"):
        planned_model(file, PlanOptions(), is_on_gpu=False)


def test_the_bytes_of_a_small_model_by_hand(tmp_path):
    config = tiny_config(**feed_forward_changes("memory_plus", "dense"))
    folder = save_model(random_model(config), tmp_path / "model")
    attention = 2 * (2 * 32 * 32 + 2 * 32 * 16)  # two layers: queries, outputs; keys, values
    dense = 3 * 32 * 48  # gate, up, down
    # queries with bias; subkeys of 2 heads, 2 halves; gate and projection with bias
    memory = (32 * 16 + 16) + 2 * 2 * 8 * 4 + 2 * (32 * 32 + 32)
    norms, embedding_and_head = 5 * 32, 2 * 260 * 32
    numbers = attention + dense + memory + norms + embedding_and_head
    assert numbers == 30_320
    found = planned_model(folder / "config.json", PlanOptions(), is_on_gpu=False)
    assert found.dense == numbers and found.weight_bytes == 2 * numbers
    # 8 * 8 rows of 32 values of 2 bytes
    assert (found.row_bytes, found.table_bytes) == (64, 4096)
    # keys and values of two heads of 8 in two layers
    assert found.kv_bytes == 2 * 2 * 2 * 8 * 2
    wide = planned_model(folder, PlanOptions(table_dtype="int8"), is_on_gpu=False)
    assert wide.weight_bytes == 4 * numbers and wide.kv_bytes == 2 * found.kv_bytes
    # 32 bytes and a scale of 4, in whole 64 bytes
    assert wide.row_bytes == 64
