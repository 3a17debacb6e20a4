"""Models with tables on disk: the same tokens for any size of the row cache."""

import errno

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from memory_ops.native import disk_rows
from memory_ops.native.disk_rows import ReadFault
from memory_ops.tables.disk import DiskTable, row_cache_bytes
from memory_ops.tables.table_statistics import TableStatistics
from server.cli.main import main
from tests.models import (
    engine_of,
    feed_forward_changes,
    greedy,
    plain_greedy,
    random_model,
    run,
    save_model,
    tiny_config,
)
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.convert import convert
from weights.errors import CheckpointError

pytestmark = pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
PROMPTS = [[(7 * i + j) % 250 for j in range(1 + i % 9)] for i in range(12)]


def cache_bytes(rows):
    """Cache size that holds ``rows`` rows of one table of the models."""
    return row_cache_bytes(rows, 32 * 4, 64)


def tokens_of(model):
    config = EngineConfig(
        max_num_seqs=6, max_batched_tokens=9, block_size=4, kv_cache_gib=0.001, max_model_len=64
    )
    requests = {i // 3: [] for i in range(12)}
    for i, prompt in enumerate(PROMPTS):
        requests[i // 3].append(greedy(str(i), prompt, 8))
    return run(engine_of(model, config), requests)


@pytest.mark.parametrize("share_values", [True, False])
@pytest.mark.parametrize("kinds", [("memory_plus", "dense", "memory_plus"), ("peer", "pkm")])
@pytest.mark.parametrize("rows", [6, 20, 64])
def test_tokens_equal_those_of_tables_in_memory(tmp_path, kinds, share_values, rows):
    changes = feed_forward_changes(*kinds, share_values=share_values)
    model = random_model(tiny_config(**changes))
    folder = save_model(model, tmp_path / "model")
    tables = len(model.config.table_names)
    loaded, _ = load_model(folder, table_cache=cache_bytes(rows) * tables)
    expected = {str(i): plain_greedy(model, prompt, 8) for i, prompt in enumerate(PROMPTS)}
    assert tokens_of(loaded) == expected
    table = loaded.model.layers[0].memory.table
    assert isinstance(table, DiskTable) and table.num_slots == rows
    counted = TableStatistics.sum(table.statistics().values())
    assert counted.misses + counted.prefetched > (rows if rows < 64 else 0)
    assert counted.hits + counted.late + counted.misses == counted.unique_rows


@pytest.mark.parametrize("row_format", ["int8", "int4", "int4_row", "fp8"])
def test_quantised_tables_can_stay_on_disk(tmp_path, row_format):
    changes = feed_forward_changes("memory_plus", "memory_plus")
    folder = save_model(random_model(tiny_config(**changes)), tmp_path / "wide")
    convert(folder, tmp_path / "narrow", table_dtype=row_format)
    held, _ = load_model(tmp_path / "narrow")
    on_disk, _ = load_model(tmp_path / "narrow", table_cache=2000)
    assert tokens_of(on_disk) == tokens_of(held)


def test_a_failed_read_fails_only_its_requests(tmp_path):
    changes = feed_forward_changes("memory_plus", "dense")
    model = random_model(tiny_config(**changes))
    save_model(model, tmp_path / "model")
    (file,) = (tmp_path / "model").glob("table-*")
    loaded, _ = load_model(tmp_path / "model", table_cache=cache_bytes(64))
    fault = ReadFault(60, -errno.EIO)
    broken = DiskTable(file, 4096, (64, 32), torch.float32, cache_bytes(6), fault=fault)
    loaded.attach_tables({"memory.table": broken})
    config = EngineConfig(max_num_seqs=2, block_size=4, kv_cache_gib=0.001, max_model_len=64)
    engine = engine_of(loaded, config)
    outcomes = {"right": 0, "failed": 0}
    for number in range(3):
        for i, prompt in enumerate(PROMPTS):
            engine.add(greedy(f"{number}-{i}", prompt, 3))
            tokens = []
            while engine.has_work:
                for output in engine.step().outputs:
                    tokens += output.token_ids
                    if output.finish_reason == "error":
                        outcomes["failed"] += 1
                    elif output.finish_reason is not None:
                        assert tokens == plain_greedy(model, prompt, 3)
                        outcomes["right"] += 1
            engine.check_integrity()
    assert outcomes["failed"] > 0 and outcomes["right"] > 0
    assert sum(outcomes.values()) == 36


def test_impossible_caches_and_files_are_refused_by_name(tmp_path):
    dense = save_model(random_model(tiny_config()), tmp_path / "dense")
    with pytest.raises(ConfigError, match="table_cache: requires value tables"):
        load_model(dense, table_cache=2**20)
    changes = feed_forward_changes("memory_plus", "dense")
    folder = save_model(random_model(tiny_config(**changes)), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"table_cache: holds 5 rows .* reads 6"):
        load_model(folder, table_cache=cache_bytes(5))
    with pytest.raises(
        ConfigError, match="table_cache: 100 bytes are too small: one row needs at least 232"
    ):
        load_model(folder, table_cache=100)
    (file,) = folder.glob("table-*")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="table-00000"):
        load_model(folder, table_cache=2**20)


def test_the_command_serves_a_table_from_disk(capsys):
    outputs = []
    on_disk = ["--table-tier", "disk", "--table-cache", "128KiB"]
    for options in ([], on_disk, [*on_disk, "--table-lookahead", "2"]):
        arguments = ["--max-tokens", "24", "--temperature", "0"]
        assert main(["generate", "memory (noun):", *options, *arguments]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2] == " something that is remembered\n"


def test_conflicting_flags_are_refused(tmp_path, capsys):
    dense = str(save_model(random_model(tiny_config()), tmp_path / "dense"))
    device, disk = ["--table-tier", "device"], ["--table-tier", "disk"]
    for options, message in (
        ([*device, "--table-cache", "2GiB"], "--table-cache: needs --table-tier host"),
        ([*disk, "--table-cache", "2GB"], "--table-cache: must be a number with KiB, MiB or GiB"),
        ([*device, "--table-lookahead", "1"], "--table-lookahead: needs --table-tier host"),
        (["--table-lookahead", "-1"], "--table-lookahead: must be 0 or more"),
        (["--table-lookahead-share", "0"], "--table-lookahead-share: 0.0 is outside (0, 8]"),
        (["--table-lookahead-share", "1"], "--table-lookahead-share: needs --table-lookahead"),
        (["--model", dense, "--table-lookahead", "1"], "this model has no memory layers"),
    ):
        assert main(["generate", "x", *options]) == 2
        assert message in capsys.readouterr().err
