"""Part disk on a tiny model: its layouts run, and the rows come from the file."""

import numpy as np
import pytest
import torch

from benchmarks import memory_variant
from benchmarks.engine_rounds import EngineRounds
from benchmarks.gpu import disk, replayed_tables, tables
from benchmarks.gpu.card_limits import CardLimits
from benchmarks.gpu.part import PartSetup
from benchmarks.gpu.recordings import STEPS
from benchmarks.gpu.table_layouts import DISK, HOST, TableLayout
from benchmarks.kernel_shapes import Shapes
from benchmarks.memory_variant import MEMORY_LAYERS
from benchmarks.row_trace import AccessTrace
from engine.config import EngineConfig
from engine.engine import Engine
from memory_ops.native import disk_rows
from memory_ops.tables.streams import StreamPair
from tests.engine.executors.cuda.on_cpu import cuda_on_cpu
from tests.memory_ops.late_stream import PromptStream
from tests.models import feed_forward_changes, tiny_config

CPU = torch.device("cpu")
ENGINE = EngineConfig(
    kv_cache_gib=0.001, max_num_seqs=1, max_batched_tokens=4, block_size=4, max_model_len=64
)
BITS, HEADS, ROWS = 6, 1, 4


class NoLock:
    """Stands for a page lock."""

    def __init__(self, memory, device) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The part with a tiny model on the CPU, few steps and a short trace."""
    shape = (16, MEMORY_LAYERS, HEADS, ROWS)
    rows = np.random.default_rng(0).integers(2**BITS, size=shape)
    trace = AccessTrace(rows, np.ones((MEMORY_LAYERS, 2**BITS), dtype=np.int64), 16)
    stream = PromptStream()

    def rounds(model, lookahead=None):
        executor = cuda_on_cpu(model.to(torch.float32), ENGINE, lookahead=lookahead, warm=False)
        return EngineRounds(Engine(executor, ENGINE), ENGINE)

    monkeypatch.setattr(
        tables, "LLAMA_8B_SHAPE", tiny_config(**feed_forward_changes(*["dense"] * 4))
    )
    monkeypatch.setattr(tables, "warm_rounds", rounds)
    monkeypatch.setattr(tables, "_CONTEXT", 3)
    for module in (tables, memory_variant):
        monkeypatch.setattr(module, "NUM_HEADS", HEADS)
        monkeypatch.setattr(module, "TOP_K", ROWS)
    for module in (tables, disk):
        monkeypatch.setattr(module, "GPU", CPU)
    monkeypatch.setattr(tables, "drawn_model", drawn_on_cpu)
    monkeypatch.setattr(disk, "PageLock", NoLock)
    monkeypatch.setattr("benchmarks.gpu.host_rows.PageLock", NoLock)
    monkeypatch.setattr("benchmarks.gpu.host_rows._RESERVE_BYTES", 0)
    monkeypatch.setattr(disk, "checked_trace", lambda file, shape: trace)
    monkeypatch.setattr(
        replayed_tables, "cuda_streams", lambda device: StreamPair(lambda: stream, stream)
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    monkeypatch.setitem(STEPS, 1, 10)
    host = TableLayout(BITS, "int8", HOST, 0.02, skews=("uniform",), batches=(1,))
    on_disk = TableLayout(BITS, "int8", DISK, 0.02, 1, ("uniform",), (1,), host_share=0.6)
    monkeypatch.setattr(disk, "disk_layouts", lambda: iter((host, on_disk)))
    return tmp_path


def drawn_on_cpu(config, dtype):
    from benchmarks.gpu.drawn_models import drawn_model

    return drawn_model(config, dtype, CPU)


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
def test_the_part_runs_on_a_tiny_model(small):
    values = {}
    limits = CardLimits(1, 1, 1)
    setup = PartSetup(
        limits, False, values.get, Shapes(), 0.1, small / "no-trace", "wordnet", small
    )
    for task in disk.tasks(setup):
        for figure in task.run(task.names):
            values[figure.name] = figure.value
    host, disk_name = "2^6 int8 host", "2^6 int8 disk 60% in host"
    ends = "cache 2% lookahead {} uniform decode 1"
    one, other = f"{host} {ends.format(0)}", f"{disk_name} {ends.format(1)}"
    assert set(values) == {
        *(one, f"{one} hit rate", other, f"{other} hit rate"),
        f"{other} / {one}",
    }
    # more rows are in host memory and the cache than in the cache alone
    assert 0 < values[f"{one} hit rate"] < values[f"{other} hit rate"] < 1
    assert not list(small.glob("rows-*"))
