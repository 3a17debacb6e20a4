"""Loading the share of one tensor-parallel rank from a folder."""

import math

import pytest
import torch

from engine.errors import ConfigError
from engine.executors.parallel.group import RankGroup
from engine.executors.parallel.shares import RankShare
from engine.executors.parallel.tables import CapturedPart
from memory_ops.row_formats import dequantize_rows
from server.cli.main import main
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints.checkpoint import load_model, open_checkpoint
from weights.checkpoints.shard_loading import (
    copied_bytes,
    load_share,
    share_bytes,
    table_share_bytes,
)

WIDTH = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(4)
    config = tiny_config(**feed_forward_changes("memory_plus", "moe", value_dim=WIDTH))
    return save_model(random_model(config), tmp_path_factory.mktemp("models") / "model")


def values(table):
    """The values of a table's part, in fp32."""
    rows = table.rows
    return rows.float() if isinstance(rows, torch.Tensor) else dequantize_rows(rows)


@pytest.mark.parametrize("sharding", ["columns", "rows"])
@pytest.mark.parametrize("table_dtype", ["auto", "bfloat16", "int8", "int4", "int4_row", "fp8"])
def test_the_ranks_have_the_values_of_the_whole_tables(folder, sharding, table_dtype):
    whole, config = load_model(folder, table_dtype=table_dtype)
    (expected,) = (values(table) for table in whole.tables.values())
    parts = []
    for rank in range(2):
        share = RankShare(config.model, rank, 2, sharding)
        model = load_share(folder, share, RankGroup(rank, 2), torch.float32, table_dtype)
        (table,) = model.tables.values()
        assert (table.num_rows, table.value_dim) == (64, WIDTH)
        assert (table.tier, table.fault, table.row_source(0)) == ("device", None, None)
        parts.append(values(table._part))
    assert torch.equal(torch.cat(parts, dim=int(sharding == "columns")), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ranks_have_the_parts_of_the_weights(folder, dtype):
    whole, config = load_model(folder, str(dtype).removeprefix("torch."))
    share = RankShare(config.model, 1, 2)
    model = load_share(folder, share, RankGroup(1, 2), dtype)
    expected = whole.state_dict()
    for name, weight in model.state_dict().items():
        part = share.part(name)
        wanted = expected[name] if part is None else part.of(expected[name])
        assert torch.equal(weight, wanted), name
        # a view of a whole weight in memory would keep all of it
        assert weight.untyped_storage().nbytes() <= expected[name].untyped_storage().nbytes()
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_weights_count_once_for_each_rank(folder, dtype):
    checkpoint, stored = open_checkpoint(folder)
    share = RankShare(checkpoint.model, 0, 2)
    dense = {k: v for k, v in stored.items() if k not in checkpoint.model.table_names}
    whole = [k for k in dense if share.part(k) is None]
    assert {"model.embed_tokens.weight", "model.norm.weight"} < set(whole) < set(dense)
    if dtype == torch.float32:
        # mapped from the file, which has this dtype
        whole = [k for k in whole if k not in ("model.embed_tokens.weight", "lm_head.weight")]
    expected = sum(math.prod(dense[k].shape) for k in whole) * dtype.itemsize
    assert copied_bytes(dense, share, dtype) == expected


@pytest.mark.parametrize("table_dtype", ["auto", "int8"])
@pytest.mark.parametrize("sharding", ["columns", "rows"])
def test_a_share_takes_its_bytes_on_the_device_that_is_asked_for(folder, sharding, table_dtype):
    checkpoint, stored = open_checkpoint(folder)
    share = RankShare(checkpoint.model, 1, 2, sharding)
    # meta tensors stand for those of a GPU
    options = torch.bfloat16, table_dtype, torch.device("meta"), CapturedPart
    group = RankGroup(1, 2)
    model = load_share(folder, share, group, *options)
    weights = model.state_dict().values()
    assert {one.device.type for one in weights} == {"meta"}
    tables = [stored[name] for name in checkpoint.model.table_names]
    assert sum(one.nbytes for one in weights) == share_bytes(share, group, torch.bfloat16)
    parts = [table._part for table in model.tables.values()]
    assert {type(part) for part in parts} == {CapturedPart}
    rows = [part.rows if table_dtype == "auto" else part.rows.records_RB for part in parts]
    assert {one.device.type for one in rows} == {"meta"}
    assert sum(one.nbytes for one in rows) == table_share_bytes(tables, table_dtype, share)


def test_int4_rows_whose_groups_would_be_split_are_refused(folder):
    config = load_model(folder)[1].model
    share = RankShare(config, 0, 2)
    changed = feed_forward_changes("memory_plus", "moe", value_dim=96)
    narrow = RankShare(tiny_config(**changed), 0, 2)
    load_share(folder, share, RankGroup(0, 2), torch.float32, "int4")
    with pytest.raises(ConfigError, match="tensor_parallel: 2 ranks would have 48 columns of int4"):
        load_share(folder, narrow, RankGroup(0, 2), torch.float32, "int4")


def test_weights_in_groups_are_widened_and_split(folder, tmp_path):
    grouped = tmp_path / "int8"
    assert main(["quantize", str(folder), str(grouped), "--weight-dtype", "int8"]) == 0
    whole, config = load_model(grouped, "float32")
    share, expected = RankShare(config.model, 1, 2), whole.state_dict()
    model = load_share(grouped, share, RankGroup(1, 2), torch.float32)
    for name, weight in model.state_dict().items():
        part = share.part(name)
        wanted = expected[name] if part is None else part.of(expected[name])
        assert torch.equal(weight, wanted), name
