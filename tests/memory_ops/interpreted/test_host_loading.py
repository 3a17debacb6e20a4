"""Tables loaded for the host tier: read in place, cached by the real kernels, or refused."""

import pytest
import torch

from engine.errors import ConfigError
from engine.model.layout import TokenLayout
from memory_ops.page_lock import PageLockError
from memory_ops.row_formats import RowRecords
from memory_ops.tables.host import HostTable
from memory_ops.tables.row_cache import RowCache, rows_memory
from memory_ops.tables.streams import StreamPair
from tests.memory_ops.fake_streams import FakeDevice, HostCaller
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints import host_tables
from weights.checkpoints.checkpoint import load_model, open_checkpoint
from weights.checkpoints.convert import convert
from weights.checkpoints.host_tables import load_host_tables
from weights.checkpoints.table_loading import table_layouts
from weights.errors import CheckpointError

pytestmark = pytest.mark.slow

CPU, META = torch.device("cpu"), torch.device("meta")
TOKENS = 7
KINDS = ("memory_plus", "peer")


@pytest.fixture
def folder(tmp_path):
    """A model with two fp32 tables; a token reads 6 rows of 128 bytes."""
    return save_model(random_model(tiny_config(**feed_forward_changes(*KINDS))), tmp_path / "model")


@pytest.fixture
def locked(monkeypatch):
    """Replaces the GPU: caches lie on the CPU, with 64 overflow rows. Collects each table's rows,
    cache bytes and layers."""
    made = []

    def fake(rows, cache_bytes, device, *, num_layers):
        assert device in (CPU, META)
        made.append((rows, cache_bytes, num_layers))
        streams = FakeDevice()
        caller = HostCaller(streams, lambda ready: ready[0])
        cache = RowCache(rows, cache_bytes, CPU, num_layers=num_layers, num_ways=2, num_overflow=64)
        return HostTable(rows, cache, StreamPair(lambda: caller, streams.side))

    monkeypatch.setattr(host_tables, "host_table", fake)
    return made


def cache_bytes(row_bytes: int, num_rows: int) -> int:
    """Bytes of the caches of two tables."""
    return 2 * (64 * row_bytes + num_rows * (row_bytes + 16))


def loaded(folder, size, dtype="auto", **options):
    config, stored = open_checkpoint(folder)
    tables = [stored[name] for name in config.model.table_names]
    layouts = table_layouts(tables, dtype)
    return load_host_tables(tables, layouts, config.model, size, CPU, **options)


@pytest.mark.parametrize(
    ("dtype", "row_bytes"),
    [
        ("auto", 128),
        ("int8", 64),
        ("bfloat16", 64),
        ("int4", 128),
    ],
)
def test_a_model_reads_loaded_tables_through_its_cache(folder, locked, dtype, row_bytes):
    model, _ = load_model(folder, table_dtype=dtype)
    wanted = {name: table.rows for name, table in model.tables.items()}
    layout, tokens = TokenLayout(torch.arange(TOKENS), (0, TOKENS)), torch.arange(TOKENS)
    with torch.no_grad():
        expected = model(tokens, layout, tokens).logits_LV
        tables = loaded(folder, cache_bytes(row_bytes, 6), dtype, verify=True)
        model.attach_tables(tables)
        found = model(tokens, layout, tokens).logits_LV
    torch.testing.assert_close(found, expected)
    for (rows, share, num_layers), name in zip(locked, wanted, strict=True):
        assert torch.equal(rows_memory(rows), rows_memory(wanted[name]))
        assert isinstance(rows, RowRecords) == (dtype in ("int8", "int4"))
        assert (share, num_layers) == (cache_bytes(row_bytes, 6) // 2, len(KINDS))
    counted = [counts for table in tables.values() for counts in table.statistics().values()]
    assert len(counted) == 3 and all(one.lookups == 1 and one.misses for one in counted)


def test_caches_begin_with_the_hot_rows(folder, locked):
    hot_rows = {"memory.table": torch.tensor([7, 2])}
    table = loaded(folder, cache_bytes(128, 6), hot_rows=hot_rows)["memory.table"]
    other = loaded(folder, cache_bytes(128, 6))["memory.table"]
    rows, weights = torch.tensor([[[7, 2]]]), torch.rand(1, 1, 2)
    table.start(rows, weights).finish()
    other.start(rows, weights).finish()
    counted = table.statistics()[0]
    assert (counted.hits, counted.misses, counted.prefetched_used) == (2, 0, 2)
    assert other.statistics()[0].misses == 2


def test_a_model_on_a_gpu_is_loaded_with_tables_in_host_memory(folder, locked):
    # meta tensors stand for those of a GPU
    model, _ = load_model(folder, table_cache=cache_bytes(128, 6), device=META)
    assert {one.device for one in model.parameters()} == {META}
    assert [table.tier for table in model.tables.values()] == ["host", "host"]
    assert [table.fetched_capacity for table in model.tables.values()] == [6, 6]
    assert all(rows.device == CPU for rows, *_ in locked)


def test_caches_that_are_too_small_are_refused(folder, locked):
    with pytest.raises(
        ConfigError, match=r"table_cache: holds 4 rows of .* one token reads 6; inc"
    ):
        loaded(folder, cache_bytes(128, 4))
    with pytest.raises(ConfigError, match="table_cache: 50 bytes are too small"):
        loaded(folder, 100)


def test_memory_that_cannot_be_page_locked_is_refused_with_the_remedy(folder, monkeypatch):
    def fail(rows, cache_bytes, device, *, num_layers):
        raise PageLockError(f"cannot page-lock {rows.nbytes} bytes of host memory: out of memory")

    monkeypatch.setattr(host_tables, "host_table", fail)
    with pytest.raises(ConfigError) as refused:
        loaded(folder, 2**20)
    assert str(refused.value) == (
        "table_tier: host cannot page-lock 8192 bytes of host memory: out of memory; raise the"
        " limit of locked memory (`ulimit -l`), free 8.0 KiB of host memory, or use a smaller"
        " --table-dtype"
    )


def test_tables_that_cannot_be_read_are_refused(folder, locked, tmp_path, monkeypatch):
    def fail(shape, dtype):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("weights.checkpoints.table_loading.anonymous_zeros", fail)
        with pytest.raises(ConfigError, match=r"table_tier: host cannot allocate 8192 bytes"):
            loaded(folder, 2**20)
    file = sorted(folder.glob("table-*"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="its checksum"):
        loaded(folder, 2**20, verify=True)


def test_rows_of_fp64_are_refused(locked, tmp_path):
    model = random_model(tiny_config(**feed_forward_changes(*KINDS)), torch.float64)
    folder = save_model(model, tmp_path / "wide")
    with pytest.raises(ConfigError, match="table_dtype: the host tier cannot hold float64 rows"):
        loaded(folder, 2**20)
    convert(folder, tmp_path / "narrow", table_dtype="float32")
    assert len(loaded(tmp_path / "narrow", 2**20)) == 2
