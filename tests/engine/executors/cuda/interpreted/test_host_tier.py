"""Tables in host memory under the CUDA executor, interpreted: evictions, lookahead, joins."""

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.lookahead import LookaheadConfig
from memory_ops.tables.host import HostTable
from tests.engine.executors.cuda.fake_device import FakeDevice
from tests.engine.executors.cuda.on_cpu import cuda_on_cpu
from tests.memory_ops.interpreted.test_host_in_model import on_host
from tests.models import (
    feed_forward_changes,
    greedy,
    plain_greedy,
    random_model,
    run,
    tiny_config,
)

pytestmark = pytest.mark.slow

PROMPTS = {"a": [1, 2, 3], "b": [4, 5, 6, 7, 8, 9, 10], "c": [11]}
CONFIG = EngineConfig(
    kv_cache_gib=0.001, max_num_seqs=3, max_batched_tokens=16, block_size=4, max_model_len=64
)
COUNT = 4


def check(model, lookahead=None, warm: bool = False) -> FakeDevice:
    """Compare tokens of a model on host tables with those of the same model on device tables."""
    expected = {name: plain_greedy(model, ids, COUNT) for name, ids in PROMPTS.items()}
    layers = model.config.num_layers
    model.attach_tables({name: on_host(t.rows, layers) for name, t in model.tables.items()})
    device = FakeDevice()
    served = Engine(cuda_on_cpu(model, CONFIG, device, lookahead, warm=warm), CONFIG)
    found = run(served, {0: [greedy(name, ids, COUNT) for name, ids in PROMPTS.items()]})
    assert found == expected
    return device


@pytest.mark.parametrize("lookahead", [None, LookaheadConfig(2, 3)])
@pytest.mark.parametrize(
    "kinds",
    [("memory_plus", "pkm"), ("dense", "peer")],
)
def test_tokens_and_evictions(kinds, lookahead):
    model = random_model(tiny_config(**feed_forward_changes(*kinds)))
    check(model, lookahead)
    counted = [counts for t in model.tables.values() for counts in t.statistics().values()]
    # eight cached rows of 64: nearly every lookup evicts some
    assert all(counts.misses > 8 for counts in counted)
    # PEER hints the rows of its second table itself
    hints = lookahead is not None or "peer" in kinds
    assert any(counts.prefetched for counts in counted) == hints


def test_every_step_joins_the_side_stream_first(monkeypatch):
    joins = []
    join = HostTable.join
    monkeypatch.setattr(HostTable, "join", lambda table: (joins.append(1), join(table)))
    model = random_model(tiny_config(**feed_forward_changes("memory_plus")))
    device = check(model, warm=True)
    # warm-up runs each shape once, without a graph
    assert device.num_replays == COUNT - 1 and len(joins) >= COUNT + device.num_replays


def test_padding_reads_the_rows_of_the_first_token():
    model = random_model(tiny_config(**feed_forward_changes("memory_plus", "dense")))
    executor = cuda_on_cpu(model, CONFIG, warm=False)
    kept = []
    run_model = executor._runner._model.run
    executor._runner._model.run = lambda *a: kept.append(run_model(*a)) or kept[-1]
    executor.run_largest()
    (trace,) = kept[0].trace.memory
    assert trace.rows_THK.shape == (16, 2, 3)
    assert torch.equal(trace.rows_THK, trace.rows_THK[:1].expand(16, 2, 3))
    torch.testing.assert_close(trace.weights_THK.sum(-1), torch.ones(16, 2))
