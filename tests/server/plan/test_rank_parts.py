"""Parts of tensor-parallel ranks, against those that ranks load, and by hand."""

import pytest
import torch

from engine.errors import ConfigError
from engine.executors.parallel.sharded_model import rank_model
from engine.executors.parallel.shares import RankShare
from engine.model.step_work import Chunk
from server.plan.options import PlanOptions
from server.plan.planned_model import planned_model
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.shard_loading import copied_bytes, load_share
from weights.checkpoints.table_files import row_layout


def saved(folder, *kinds):
    memory = {"value_dim": 48} if set(kinds) & {"memory_plus", "pkm", "peer"} else {}
    config = tiny_config(
        hidden_size=48, num_heads=6, num_kv_heads=3, **feed_forward_changes(*kinds, **memory)
    )
    return save_model(random_model(config), folder / "model"), config


def planned(source, ranks, **options):
    asked = PlanOptions(tensor_parallel=ranks, **options)
    return planned_model(source, asked, is_on_gpu=False)


KINDS = [("dense", "moe"), ("memory_plus", "pkm"), ("peer", "dense")]


@pytest.mark.parametrize("sharding", ["columns", "rows"])
@pytest.mark.parametrize("kinds", KINDS, ids=lambda one: "-".join(one))
def test_ranks_have_the_bytes_that_they_load(tmp_path, kinds, sharding):
    folder, config = saved(tmp_path, *kinds)
    has_tables = bool(config.table_names)
    options = {"table_sharding": sharding, "table_dtype": "int8"} if has_tables else {}
    for size in (2, 3):
        model = planned(folder, size, dtype="bfloat16", **options)
        for rank, part in enumerate(model.ranks):
            share = RankShare(config, rank, size, sharding)
            made = rank_model(share, None).state_dict()
            assert part.weight_bytes == 2 * sum(one.numel() for one in made.values())
            assert part.kv_bytes == share.kv_config.kv_bytes_per_token(2)
            if has_tables:
                loaded = load_share(folder, share, None, torch.bfloat16, "int8")
                tables = loaded.tables.values()
                own = [table._part.rows.records_RB.nbytes for table in tables]
                assert part.table_bytes == sum(own)


def test_the_parts_of_a_memory_layer_by_hand(tmp_path):
    config = tiny_config(**feed_forward_changes("memory_plus", "dense"))
    folder = save_model(random_model(config), tmp_path / "model")
    first, second = planned(folder / "config.json", 2).ranks
    # queries and outputs, keys and values, of half of the heads; gate, up and down of 24 columns
    attention, dense = 2 * 32 * 16 + 2 * 32 * 8, 3 * 32 * 24
    # whole: queries with bias, subkeys; gate with bias for 16 columns, projection with whole bias
    memory = (32 * 16 + 16) + 2 * 2 * 8 * 4 + (32 * 16 + 16) + (32 * 16 + 32)
    norms, embedding = 5 * 32, 260 * 32
    numbers = 2 * attention + dense + memory + norms + 2 * embedding
    for part in (first, second):
        assert part.weight_bytes == 2 * numbers
        assert part.table_bytes == 64 * 16 * 2
        # keys and values of one head in two layers
        assert part.kv_bytes == 2 * 2 * 8 * 2
    # each computes half of the logits, and reads half of each of 6 rows
    step = first.work.of([Chunk(9, 1)], num_logits=1)
    read = numbers - 2 * embedding + embedding // 2
    assert step.num_bytes == 2 * read + 6 * 16 * 2 + 10 * part.kv_bytes
    biases = 16 + 16 + 32
    sums = 2 * (6 * 16) + 2 * 3**2
    attended = 4 * 10 * 2 * 2 * 8
    assert step.flops == 2 * (read - norms - biases) + sums + attended


def test_all_ranks_together_do_the_work_of_one_process(tmp_path):
    folder, _ = saved(tmp_path, "dense", "moe")
    whole, ranks = planned(folder, 1), planned(folder, 3).ranks
    chunks = [Chunk(9, 1), Chunk(0, 4)]
    together = [part.work.of(chunks, 2) for part in ranks]
    one = whole.work.of(chunks, 2)
    # the router is whole on each rank
    router = 2 * 5 * 48 * 5
    assert sum(step.flops for step in together) == one.flops + 2 * router
    norms = 5 * 48
    assert sum(step.num_bytes for step in together) == one.num_bytes + 2 * 4 * (norms + 5 * 48)


def test_heads_that_do_not_divide_make_one_rank_larger(tmp_path):
    folder, _ = saved(tmp_path, "dense", "dense")
    small, large = planned(folder, 2).ranks
    assert (small.kv_bytes, large.kv_bytes) == (2 * 2 * 8 * 4, 2 * 2 * 2 * 8 * 4)
    # of 3 KV heads one and two, each with 2 query heads
    assert large.weight_bytes - small.weight_bytes == 2 * 4 * 48 * 8 * (2 * 2 + 2 * 1)


def test_rows_of_a_table_are_read_by_their_owners(tmp_path):
    folder, _ = saved(tmp_path, "memory_plus", "dense")
    columns, rows = (planned(folder, 2, table_sharding=one).ranks[0] for one in ("columns", "rows"))
    assert columns.table_bytes == rows.table_bytes == 64 * 24 * 4
    # 6 rows a token: half of each, or half of them
    assert columns.work.table_bytes(1) == rows.work.table_bytes(1) == 6 * 24 * 4
    assert (columns.work.read_fraction, rows.work.read_fraction) == (0.5, 1.0)


def test_ranks_on_a_cpu_have_embedding_and_head_once(tmp_path):
    folder, config = saved(tmp_path, "memory_plus", "dense")
    _, stored = open_checkpoint(folder)
    dense = {name: one for name, one in stored.items() if name not in config.table_names}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = planned(folder, 2, dtype=name)
        copies = copied_bytes(dense, RankShare(config, 0, 2), dtype)
        found = model.bytes_in_memory(100, has_tables=True, is_on_gpu=False)
        assert found == model.weight_bytes + copies + model.table_bytes + 100 * model.kv_bytes
        largest = max(
            one.weight_bytes + one.table_bytes + 100 * one.kv_bytes for one in model.ranks
        )
        assert model.bytes_in_memory(100, has_tables=True, is_on_gpu=True) == largest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 4}, "tensor_parallel: 4 exceeds num_key_value_heads 3"),
        ({"kv_dtype": "int8"}, "kv_dtype: int8 cannot be combined with tensor_parallel"),
        ({"table_dtype": "int4"}, "tensor_parallel: 2 ranks would have 24 columns of int4 rows"),
    ],
)
def test_what_ranks_cannot_share_is_refused_as_by_the_server(tmp_path, options, message):
    folder, _ = saved(tmp_path, "memory_plus", "dense")
    for source in (folder, folder / "config.json"):
        with pytest.raises(ConfigError, match=f"^{message}"):
            planned(source, **({"ranks": 2} | options))


def test_a_split_needs_tables(tmp_path):
    folder, _ = saved(tmp_path, "dense", "dense")
    with pytest.raises(ConfigError, match="^table_sharding: requires value tables"):
        planned(folder, 2, table_sharding="rows")


def test_tiers_that_the_server_refuses_are_named(tmp_path):
    folder, _ = saved(tmp_path, "memory_plus", "dense")
    assert planned(folder, 1).refused == {}
    refused = planned(folder, 2).refused
    assert refused["disk"] == (
        "table_tier: disk cannot be combined with --tensor-parallel yet; use device"
    )
    assert set(refused) == {"host", "disk"}
    # rows on disk are read as they are stored
    refused = planned(folder, 1, table_dtype="int8").refused
    assert list(refused) == ["disk"]
    assert refused["disk"].startswith("table_dtype: the disk tier cannot convert float32 rows")
    assert planned(folder / "config.json", 1, table_dtype="int8").refused == {}
    assert (
        row_layout("int8", 64, 48).num_bytes == planned(folder, 1, table_dtype="int8").table_bytes
    )
