"""Memory of the ranks of one machine, against the bytes of the shares that they load."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from engine.executors.parallel.group import RankGroup
from engine.executors.parallel.shares import RankShare
from memory_ops.row_formats import RowRecords
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.machine_bytes import machine_bytes
from weights.checkpoints.shard_loading import load_share

MAPPED = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(4)
    kinds = ("memory_plus", "moe", "dense")
    changes = feed_forward_changes(*kinds, value_dim=96)
    config = tiny_config(hidden_size=48, num_heads=6, num_kv_heads=3, **changes)
    return save_model(random_model(config), tmp_path_factory.mktemp("models") / "model")


def loaded_bytes(folder, share, dtype, table_dtype):
    """Bytes of a rank's weights but those that it maps, and of its tables."""
    group = RankGroup(share.rank, share.size)
    model = load_share(folder, share, group, dtype, table_dtype)
    weights = {name: one.nbytes for name, one in model.state_dict().items()}
    tables = [table._part.rows for table in model.tables.values()]
    rows = [one.records_RB if isinstance(one, RowRecords) else one for one in tables]
    mapped = sum(weights.pop(name) for name in MAPPED) if dtype == torch.float32 else 0
    return sum(weights.values()), sum(one.nbytes for one in rows), mapped


@pytest.mark.parametrize("sharding", ["columns", "rows"])
@pytest.mark.parametrize(
    ("dtype", "table_dtype"), [(torch.float32, "auto"), (torch.bfloat16, "int8")]
)
@pytest.mark.parametrize("ranks", [range(3), range(1), range(1, 3), range(2, 3)], ids=str)
def test_a_machine_needs_what_its_ranks_load(folder, sharding, dtype, table_dtype, ranks):
    checkpoint, stored = open_checkpoint(folder)
    tables = [stored.pop(name) for name in checkpoint.model.table_names]
    share = RankShare(checkpoint.model, 0, 3, sharding)
    found = machine_bytes(stored, tables, share, ranks, dtype, table_dtype)
    weights = rows = 0
    for rank in ranks:
        own, own_rows, mapped = loaded_bytes(folder, replace(share, rank=rank), dtype, table_dtype)
        weights, rows = weights + own, rows + own_rows
    assert (found.weights, found.tables) == (weights + mapped, rows)
    assert found.kv_heads == found.columns == Fraction(len(ranks), 3)


@pytest.mark.parametrize("whole", [1, 7, 2**30, 2**31 + 1])
def test_kv_blocks_of_all_heads_follow_from_those_of_a_machine(folder, whole):
    checkpoint, stored = open_checkpoint(folder)
    tables = [stored.pop(name) for name in checkpoint.model.table_names]
    share = RankShare(checkpoint.model, 0, 2)  # of 3 heads it has 1
    for ranks, heads in ((range(2), 3), (range(1), 1), (range(1, 2), 2)):
        found = machine_bytes(stored, tables, share, ranks, torch.float32, "auto")
        assert found.kv_heads == Fraction(heads, 3)
        here = found.kv_bytes(whole)
        assert here * 3 >= whole * heads > (here - 1) * 3
        assert whole <= found.whole_kv_bytes(here) < whole + 3
