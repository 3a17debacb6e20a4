"""Tables opened for the disk tier of a GPU: read through both caches, warmed, or refused."""

import pytest
import torch

from engine.errors import ConfigError
from engine.executors.cuda.micro_batches import HINTS_PER_LAYER
from engine.model.layout import TokenLayout
from memory_ops.native import disk_rows
from memory_ops.page_lock import PageLockError
from memory_ops.tables.disk import row_cache_bytes
from memory_ops.tables.gpu_disk import GpuDiskTable
from memory_ops.tables.row_cache import RowCache
from tests.memory_ops.late_stream import PromptStream
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints import gpu_disk_tables
from weights.checkpoints.checkpoint import load_model, open_checkpoint
from weights.checkpoints.gpu_disk_tables import open_gpu_disk_tables
from weights.checkpoints.table_loading import table_layouts
from weights.errors import CheckpointError

pytestmark = pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")

CPU, META = torch.device("cpu"), torch.device("meta")
TOKENS = 7
KINDS = ("memory_plus", "peer")
ROW_BYTES, NUM_ROWS = 128, 64
# of two tables: 9 rows in host memory, and one set of two rows on the device
HOST_CACHE = 2 * row_cache_bytes(9, ROW_BYTES, NUM_ROWS)
GPU_CACHE = 2 * (64 * ROW_BYTES + 2 * (ROW_BYTES + 16))


@pytest.fixture
def folder(tmp_path):
    """A model with two fp32 tables; a token reads 6 rows of 128 bytes."""
    return save_model(random_model(tiny_config(**feed_forward_changes(*KINDS))), tmp_path / "model")


@pytest.fixture
def made(monkeypatch):
    """Replaces the GPU: caches lie on the CPU, with 64 overflow rows. Collects the tables."""
    made = []

    def fake(disk, cache_bytes, device, calls, *, num_layers, num_hints):
        assert device in (CPU, META) and num_layers == len(KINDS)
        # of the two layers, one reads the second table
        assert num_hints == HINTS_PER_LAYER * (1 if made else 2)
        ways = {"num_ways": 2, "num_overflow": 64}
        cache = RowCache(
            disk.slots, cache_bytes, CPU, num_layers=num_layers, num_rows=disk.num_rows, **ways
        )
        stream = PromptStream()
        made.append(
            GpuDiskTable(
                disk, cache, lambda: stream, calls, num_hints=num_hints, most_references=64
            )
        )
        return made[-1]

    monkeypatch.setattr(gpu_disk_tables, "gpu_disk_table", fake)
    return made


def opened(folder, caches=(GPU_CACHE, HOST_CACHE), dtype="auto", **options):
    config, stored = open_checkpoint(folder)
    tables = [stored[name] for name in config.model.table_names]
    layouts = table_layouts(tables, dtype)
    return open_gpu_disk_tables(tables, layouts, config.model, caches, CPU, **options)


@pytest.mark.slow
def test_a_model_reads_opened_tables_through_both_caches(folder, made):
    model, _ = load_model(folder)
    layout, tokens = TokenLayout(torch.arange(TOKENS), (0, TOKENS)), torch.arange(TOKENS)
    with torch.no_grad():
        expected = model(tokens, layout, tokens).logits_LV
        model.attach_tables(opened(folder, verify=True))
        found = model(tokens, layout, tokens).logits_LV
    torch.testing.assert_close(found, expected)
    assert len(made) == 2 and len({id(table.calls) for table in made}) == 1
    assert [table.fetched_capacity for table in made] == [9, 9]
    assert all(one.misses for table in made for one in table.statistics().values())


def test_the_host_cache_begins_with_the_hot_rows(folder, made):
    table = opened(folder, hot_rows={"memory.table": torch.tensor([7, 2])})["memory.table"]
    table.start(torch.tensor([[[7, 2]]]), torch.rand(1, 1, 2)).finish()
    assert table.statistics()[0].hits == 2


def test_a_model_on_a_gpu_is_loaded_with_tables_on_disk(folder, made):
    # meta tensors stand for those of a GPU
    caches = {"table_cache": GPU_CACHE, "host_cache": HOST_CACHE}
    model, _ = load_model(folder, device=META, **caches)
    assert {one.device for one in model.parameters()} == {META}
    assert [table.tier for table in model.tables.values()] == ["disk"] * 2


def test_what_cannot_be_opened_is_refused(folder, made, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"table_dtype: the disk tier cannot convert"):
        opened(folder, dtype="int8")
    with pytest.raises(ConfigError, match=r"table_cache: holds 5 rows of .* one token reads 6; in"):
        opened(folder, (GPU_CACHE, 2 * row_cache_bytes(5, ROW_BYTES, NUM_ROWS)))
    with pytest.raises(ConfigError, match="table_cache: 50 bytes are too small"):
        opened(folder, (100, HOST_CACHE))

    def fail(disk, cache_bytes, device, calls, *, num_layers, num_hints):
        raise PageLockError("cannot page-lock 8192 bytes of host memory: out of memory")

    monkeypatch.setattr(gpu_disk_tables, "gpu_disk_table", fail)
    with pytest.raises(ConfigError, match=r"table_tier: disk cannot page-lock .* --table-cache"):
        opened(folder)
    file = sorted(folder.glob("table-*"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="its checksum"):
        opened(folder, verify=True)
    wide = random_model(tiny_config(**feed_forward_changes("memory_plus")), torch.float64)
    with pytest.raises(ConfigError, match="table_dtype: a GPU cannot read float64 rows from disk"):
        opened(save_model(wide, tmp_path / "wide"))
